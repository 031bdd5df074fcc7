"""What survives a back-end that is killed: random kills, kills at each step, storage that outlives the process."""
