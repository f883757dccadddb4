"""The mixture of a batch of rows on a GPU, in Triton, and its dense records. `launch.mix_logits` and
`dense.measure_rows` are the doors.

`layout` names the slots that the launches share; `sums` reads and sums a row. `nodes`, `steps` and `blend` are the
launches of the mixture in their order, `average` and `swap` what two kinds of rows need in them, `scalars` and
`likeliest` those of dense records.
"""
