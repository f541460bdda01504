"""What the commands about formats and values print."""
