"""A key provider as a program and as a gRPC service: AES-GCM under one key, with the JSON of the ocicrypt protocol.

Run as a program it takes a mode: base64 or integers (how it answers), or one of the faults fail, garbage, flood, hang.
"""

import base64
import json
import os
import sys
import time
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEY = bytes(range(32))


class Denied(Exception):
    """This key does not open the packet."""


def answer(request: bytes, mode: str = "base64") -> bytes:
    value: dict[str, Any] = json.loads(request)

    def encoded(raw: bytes) -> Any:
        return list(raw) if mode == "integers" else base64.b64encode(raw).decode()

    if value["op"] == "keywrap":
        nonce = os.urandom(12)
        options = base64.b64decode(value["keywrapparams"]["optsdata"])
        packet = {"iv": nonce.hex(), "data": AESGCM(KEY).encrypt(nonce, options, None).hex()}
        return json.dumps({"keywrapresults": {"annotation": encoded(json.dumps(packet).encode())}}).encode()
    assert isinstance(value["keyunwrapparams"]["dc"]["Parameters"], dict)
    packet = json.loads(base64.b64decode(value["keyunwrapparams"]["annotation"]))
    try:
        options = AESGCM(KEY).decrypt(bytes.fromhex(packet["iv"]), bytes.fromhex(packet["data"]), None)
    except InvalidTag as error:
        raise Denied("canary: wrong key") from error
    return json.dumps({"keyunwrapresults": {"optsdata": encoded(options)}}).encode()


def main(mode: str) -> int:
    if mode == "fail":
        print("canary on stderr", file=sys.stderr)
        return 3
    if mode == "garbage":
        sys.stdin.read()
        print("canary on stdout")
        return 0
    if mode == "flood":
        try:
            while True:
                sys.stdout.write("x" * 65536)
        except BrokenPipeError:
            return 0
    if mode == "hang":
        time.sleep(3600)
    try:
        sys.stdout.buffer.write(answer(sys.stdin.buffer.read(), mode))
    except Denied:
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
