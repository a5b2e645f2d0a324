"""The replay buffer in Parquet."""
