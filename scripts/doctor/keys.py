"""Checks of the wallet: the hotkey can sign, and only the hotkey is here."""

from __future__ import annotations

from scripts.doctor.options import DoctorOptions
from scripts.doctor.report import Finding, fail, ok, skipped, warn
from subnet.wallets import Keys

_NEEDS = "needs --wallet and --hotkey"


def check_hotkey(keys: Keys | None, options: DoctorOptions, *, unusable: str = "") -> Finding:
    """`unusable`: why it cannot sign although it can be read."""
    if keys is None:
        return skipped("hotkey", _NEEDS)
    given = options.keys_given
    if not keys.present:
        others = (
            f"hotkeys of this wallet here: {', '.join(keys.others)}"
            if keys.others
            else "no hotkey of this wallet is here"
        )
        remedy = f"--hotkey {keys.others[0]}, or " if keys.others else ""
        return fail(
            "hotkey",
            f"no file {keys.file} ({others})",
            f"{remedy}copy the file there, or from its mnemonic: btcli wallet regen-hotkey {given}",
        )
    if keys.problem:
        return fail(
            "hotkey", f"{keys.file} cannot be read: {keys.problem}", f"btcli wallet regen-hotkey {given} --overwrite"
        )
    if keys.encrypted and not keys.password_set:
        return warn(
            "hotkey",
            f"{keys.file} is encrypted: a node that starts by itself cannot ask for its password",
            "start it in a terminal and type the password; or write the key unencrypted, from its mnemonic: "
            f"btcli wallet regen-hotkey {given} --overwrite",
        )
    if unusable:
        return fail("hotkey", unusable, f"btcli wallet regen-hotkey {given} --overwrite, or --hotkey with another one")
    return ok("hotkey", f"{keys.address or '?'} ({keys.file}{', encrypted' if keys.encrypted else ''})")


def check_coldkey(keys: Keys | None) -> Finding:
    if keys is None:
        return skipped("coldkey", _NEEDS)
    if not keys.coldkey:
        return ok("coldkey", "its private key is not on this machine")
    return warn(
        "coldkey",
        f"its private key is here ({keys.coldkey}, {'encrypted' if keys.coldkey_encrypted else 'not encrypted'}): "
        "whoever breaks into a mining machine takes all funds, and a node never needs it",
        f"copy it to a machine that does not mine, check it there, then: rm {keys.coldkey} (coldkeypub.txt may stay)",
    )
