"""How llmos is run: `dev` on one machine, `images` and `helm` on a cluster."""
