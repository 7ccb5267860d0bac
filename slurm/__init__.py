"""From a config to a Slurm job that goes on until the run is finished."""
