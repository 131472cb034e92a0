"""What a user types: the job file, the command line and the reports around a run."""
