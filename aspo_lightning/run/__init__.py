"""What a run leaves on the disk, and what watches over it."""
