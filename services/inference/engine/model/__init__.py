"""Models of the Llama family: what they are, how they are loaded, how they are computed with torch.

`weights` describes a model as plain tensors and numbers, whatever its family; `families` is the table of what
each family does otherwise; `loader` reads a folder into `weights`. `torch_step` computes a step: `plan` says
in index tensors what it reads and writes, `attention` and `matrix` are its sums, `prepared` is the model in
the form it multiplies with, `self_check` tries whether rows are the same in every batch. `cuda_step` is the
same on a GPU. `engine/native` computes the same step in C on CPUs.
"""
