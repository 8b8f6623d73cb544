"""The embedded development chain: Substrate's JSON-RPC, real metadata, one subnet, nothing to install.

For development and tests only: its keys are public. The unmodified `bittensor` SDK is the client. Rooms, from the
inside out: `codec` (SCALE), `state` (versioned storage), `dispatch` and `pallets/` (calls), `schedule`, `yuma` and
`epoch` (consensus), `extrinsic` (signatures), `genesis`, `block` and `blocks` (pool and block production), `store` (the
chain on disk), `drand`, `runtime_api`, `rpc` (JSON-RPC), `node` (clock and websocket). As a process: `python -m
subnet.localchain --port 9944 --state runs/chain`.
"""

from subnet.localchain.genesis import ChainConfig
from subnet.localchain.node import LocalChain

__all__ = ["ChainConfig", "LocalChain"]
