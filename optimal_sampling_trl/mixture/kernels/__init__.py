"""The mixture of a batch of rows on a GPU, in Triton. `launch.mix_logits` is the door."""
