"""A race to a stated quality: training time on a stated machine, beside plain loops (`python -m bench.speedrun`)."""
