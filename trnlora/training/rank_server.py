"""Imported only by the server that forks ranks: imports everything that a rank needs. The server ends with its parent.

Otherwise ranks would survive a killed launcher: each of them holds the pipe by which the server notices its end.
"""

import trnlora.backends.torch_training
import trnlora.training.run  # noqa: F401
from trnlora.training.launch import end_with_parent

end_with_parent()
