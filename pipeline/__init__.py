"""From a bucket of images to Parquet rows: the only layer where Ray, Parquet and object storage meet."""
