"""What works on whole studies: running, comparing, seeds, other people's arrays."""
