"""One model over several processes: tensor, pipeline, expert and data parallelism."""
