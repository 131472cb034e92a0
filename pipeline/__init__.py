"""From a bucket of images to Parquet rows: the only layer where Ray, Parquet and object storage meet."""

import os

# Ray Data divides a cluster's CPUs among all runs that lately asked for a share, and a killed driver asks for 180 s
# after its death: the run that takes over would stand still. Read when Ray Data is imported.
os.environ.setdefault("RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S", "30")
