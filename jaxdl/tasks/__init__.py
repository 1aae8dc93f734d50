"""What families of one purpose share: batches, evaluation, pictures."""
