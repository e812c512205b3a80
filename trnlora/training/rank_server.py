"""Imported only by the server that forks ranks: all that a rank imports. The server ends with its parent.

Without that, ranks would outlive a launcher that is killed: each holds the pipe by which the server notices its end.
"""

import trnlora.backends.torch_training
import trnlora.training.run  # noqa: F401
from trnlora.training.launch import end_with_parent

end_with_parent()
