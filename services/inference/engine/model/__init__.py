"""Models of the Llama family: what they are, how they are loaded, how they are computed with torch.

`weights` describes a model as plain tensors and numbers, whatever its family; `families` reads those out of
what transformers knows of a folder; `torch_step` computes a step over them. `engine/native` computes the same
step in C on CPUs.
"""
