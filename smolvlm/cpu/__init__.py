"""Native code for CPUs, compiled where it runs: attention, and the resizing of images."""
