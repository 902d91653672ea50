"""What a run measures at its start, where no rule tells what is faster."""
