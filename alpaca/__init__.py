"""The rooms behind the scripts, one a job."""
