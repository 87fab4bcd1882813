"""What each torch call means in TensorRT, one family of calls a file.

Importing this package registers every converter, but for those of torchvision's and modelopt's operators and of torch's
quantised programs, which `registry.load` adds once these are imported. A file imports nothing of torch2rt but its
vocabulary.
"""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    if _module.name not in ("vision", "decomposed", "modelopt"):
        importlib.import_module(f"{__name__}.{_module.name}")
