"""Tools to find where a conversion differs from its module.

`compare` prints, for each module, how far its values are off, and where the error arises; `first_difference` names the
first call that differs. Each conversion is verified by itself, too
(`torch2rt.debug.verify`).
"""

from torch2rt.debug.beside import Beside as Beside
from torch2rt.debug.beside import compare as compare
from torch2rt.debug.beside import first_difference as first_difference
