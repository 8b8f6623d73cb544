"""Wallets on disk, in the layout that btcli and the SDK share:

`PATH/NAME/coldkey`, `PATH/NAME/hotkeys/HOTKEY`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from bittensor.keyfiles import Keyfile, KeyfileError, Keypair
from bittensor.wallet import Wallet

from subnet.chain_errors import WalletError

DEFAULT_PATH = Path("~/.bittensor/wallets")


def load_wallet(name: str, hotkey: str, path: Path = DEFAULT_PATH) -> Wallet:
    """A wallet whose hotkey can sign now.

    The coldkey may be absent or locked: only registration and staking need it.
    """
    root = path.expanduser()
    wallet = Wallet(name, hotkey, str(root))
    file = wallet.hotkey_file.path
    try:
        wallet.unlock_hotkey()
    except FileNotFoundError as error:
        found = sorted(item.name for item in (root / name / "hotkeys").glob("*") if not item.name.endswith("pub.txt"))
        have = f"hotkeys there: {', '.join(found)}" if found else f"no hotkeys under {root / name}"
        raise WalletError(
            f"no hotkey file {file} ({have}); check --wallet, --hotkey and --wallet-path, or create it with "
            f"`btcli wallet new-hotkey`"
        ) from error
    except (OSError, ValueError, KeyfileError) as error:
        raise WalletError(
            f"hotkey file {file} cannot be used: {' '.join(str(error).split())}; check its password"
        ) from error
    return wallet


@dataclass(frozen=True, slots=True, kw_only=True)
class Keys:
    """What lies on disk of a wallet. Nothing secret."""

    file: str
    """Of the hotkey."""
    others: tuple[str, ...]
    """Hotkeys of the same wallet."""
    present: bool
    encrypted: bool
    password: str
    """Environment variable that a password for it is taken from."""
    password_set: bool
    address: str | None
    """The hotkey's ss58, None where it cannot be told without a password or from a damaged file."""
    problem: str = ""
    """Why the hotkey cannot be used."""
    coldkey: str = ""
    """File of the coldkey's private key, empty if it is not on this machine."""
    coldkey_encrypted: bool = False


def look_at_keys(name: str, hotkey: str, path: Path = DEFAULT_PATH) -> Keys:
    """What a wallet consists of on this machine. Asks for no password, decrypts nothing."""
    root = path.expanduser()
    wallet = Wallet(name, hotkey, str(root))
    key, cold = wallet.hotkey_file, wallet.coldkey_file
    encrypted, address, problem = False, None, ""
    try:
        encrypted = key.exists_on_device() and key.is_encrypted()
        if encrypted and wallet.hotkeypub_file.exists_on_device():
            address = wallet.hotkeypub_file.get_keypair().ss58_address
        elif key.exists_on_device() and not encrypted:
            address = key.get_keypair().ss58_address
    except (OSError, ValueError, KeyfileError) as error:
        problem = " ".join(str(error).split())
    folder = root / name / "hotkeys"
    return Keys(
        file=key.path,
        others=tuple(sorted(item.name for item in folder.glob("*") if not item.name.endswith("pub.txt"))),
        present=key.exists_on_device(),
        encrypted=encrypted,
        password=key.env_var_name(),
        password_set=bool(os.environ.get(key.env_var_name())),
        address=address,
        problem=problem,
        coldkey=cold.path if cold.exists_on_device() else "",
        coldkey_encrypted=cold.is_encrypted(),
    )


def create_wallet(
    name: str,
    hotkey: str,
    path: Path,
    *,
    coldkey_uri: str | None = None,
    hotkey_uri: str | None = None,
) -> Wallet:
    """Write an unencrypted development wallet, from URIs such as `//Alice` or with fresh keys.

    An existing coldkey of that name is kept (so one coldkey can own many hotkeys) if it is the one that is
    asked for; WalletError for a different one, and for a hotkey that exists.
    """
    wallet = Wallet(name, hotkey, str(path.expanduser()))
    if wallet.coldkeypub_file.exists_on_device():
        if coldkey_uri is not None and wallet.coldkeypub.ss58_address != _keypair(coldkey_uri).ss58_address:
            raise WalletError(f"{wallet.coldkeypub_file.path} is not {coldkey_uri}; choose another name or path")
    else:
        _write(_keypair(coldkey_uri), wallet.coldkey_file, wallet.coldkeypub_file)
    if wallet.hotkey_file.exists_on_device():
        raise WalletError(f"{wallet.hotkey_file.path} exists already; choose another hotkey name or path")
    _write(_keypair(hotkey_uri), wallet.hotkey_file, wallet.hotkeypub_file)
    return Wallet(name, hotkey, str(path.expanduser()))


def _keypair(uri: str | None) -> Keypair:
    return (
        Keypair.create_from_uri(uri) if uri is not None else Keypair.create_from_mnemonic(Keypair.generate_mnemonic(12))
    )


def _write(keypair: Keypair, secret: Keyfile, public: Keyfile) -> None:
    view = Keypair(
        ss58_address=keypair.ss58_address,
        public_key=bytes(keypair.public_key),
        crypto_type=keypair.crypto_type,
    )
    try:
        secret.set_keypair(keypair, encrypt=False)
        public.set_keypair(view, encrypt=False)
    except OSError as error:
        raise WalletError(f"cannot write {secret.path}: {error.strerror or error}; choose another path") from error
