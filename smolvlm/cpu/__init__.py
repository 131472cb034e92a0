"""Native code for CPUs, compiled where it runs: attention, layers in 8-bit integers, and the resizing of images."""
