"""How each weight of a network follows from the parameters and buffers of the module, so that it can be made again.

`Tape` writes down what is computed from them while a module is traced and lowered, and what Python read of their
values. `Recipes` is what the weights of one network need of it: it makes the weights of other values, or says why the
network is not the right one for them.
"""
