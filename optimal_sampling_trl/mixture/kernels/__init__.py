"""The mixture of a batch of rows on a GPU, in Triton. `launch.mix_logits` is the door.

`layout` names the slots that the launches share; `sums` reads and sums a row; `nodes`, `steps` and `blend` are the
launches in their order.
"""
