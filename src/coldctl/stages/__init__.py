"""One module per subcommand, one public function each; checkpoints on disk are their only link."""
