"""Ways in which the control enters the backbone; imports nothing heavy, for the options."""

from typing import Literal, get_args

#: After the backbone's blocks, or once before the first block.
Injection = Literal["blocks", "latent"]
INJECTIONS: tuple[str, ...] = get_args(Injection)
