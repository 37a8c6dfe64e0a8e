"""What every room needs: it imports nothing of ours."""
