"""What others build on: files and folders that are there whole or not at all, by whom they are written, and digests."""
