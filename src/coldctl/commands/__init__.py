"""One module per subcommand, one public function each. No terminal."""
