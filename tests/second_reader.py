"""A second implementation of the sealed image format, written from docs/formats.md alone.

Reads a sealed image from an OCI layout with a private key and yields its files. It shares no line with the package and
imports nothing but the standard library, `cryptography`, `zstandard` and `blake3`, so that what the documentation says
and what the package does cannot drift apart unseen. Slow and simple on purpose; every check raises `Refused`.

    python tests/second_reader.py LAYOUT TAG PRIVATE.pem        prints one JSON line per file system object
"""

import base64
import hashlib
import hmac
import io
import json
import struct
import sys
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zstandard
from blake3 import blake3
from cryptography.hazmat.primitives import hashes, keywrap, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

BLOCK = 4096
SEALED_FLAG = 0x1_0000_0000
NYDUS_BLOB = "application/vnd.oci.image.layer.nydus.blob.v1"
BOOTSTRAP = "containerd.io/snapshot/nydus-bootstrap"


class Refused(Exception):
    """The image is not what the format says."""


def need(condition: object, what: str) -> None:
    if not condition:
        raise Refused(what)


# ---- OCI layout ----


class Layout:
    def __init__(self, path: Path) -> None:
        self.path = path

    def blob(self, descriptor: dict[str, Any]) -> bytes:
        data = self.raw(descriptor["digest"])
        need(len(data) == descriptor["size"], f"size of {descriptor['digest']}")
        return data

    def raw(self, digest: str) -> bytes:
        algorithm, _, name = digest.partition(":")
        need(algorithm == "sha256" and len(name) == 64, "digest")
        data = (self.path / "blobs" / "sha256" / name).read_bytes()
        need(hashlib.sha256(data).hexdigest() == name, f"digest of {digest}")
        return data

    def manifest(self, tag: str) -> dict[str, Any]:
        index = json.loads((self.path / "index.json").read_bytes())
        for entry in index["manifests"]:
            if entry.get("annotations", {}).get("org.opencontainers.image.ref.name") == tag:
                return json.loads(self.blob(entry))
        raise Refused(f"no tag {tag}")


# ---- key release ----


def b64u(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def unwrap_jwe(packet: bytes, key: Any) -> bytes:
    """RFC 7516 JSON serialization, flattened or general; RSA-OAEP and ECDH-ES+A256KW with A256GCM."""
    jwe = json.loads(packet)
    protected = json.loads(b64u(jwe["protected"])) if jwe.get("protected") else {}
    for recipient in jwe.get("recipients", [jwe]):
        header = {**protected, **jwe.get("unprotected", {}), **recipient.get("header", {})}
        wrapped = b64u(recipient["encrypted_key"])
        try:
            if header["alg"] == "RSA-OAEP" and isinstance(key, rsa.RSAPrivateKey):
                oaep = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), None)
                cek = key.decrypt(wrapped, oaep)
            elif header["alg"] == "ECDH-ES+A256KW" and isinstance(key, ec.EllipticCurvePrivateKey):
                cek = keywrap.aes_key_unwrap(agree(header, key), wrapped)
            else:
                continue
            need(header["enc"] == "A256GCM", "enc")
            aad = jwe["protected"].encode() + (b"." + jwe["aad"].encode() if "aad" in jwe else b"")
            return AESGCM(cek).decrypt(b64u(jwe["iv"]), b64u(jwe["ciphertext"]) + b64u(jwe["tag"]), aad)
        except (ValueError, keywrap.InvalidUnwrap):
            continue
    raise Refused("no recipient is ours")


def agree(header: dict[str, Any], key: ec.EllipticCurvePrivateKey) -> bytes:
    """Concat KDF of NIST SP 800-56A for ECDH-ES+A256KW (RFC 7518 §4.6)."""
    epk = header["epk"]
    need(epk["crv"] == {256: "P-256", 384: "P-384", 521: "P-521"}[key.curve.key_size], "curve")
    x, y = (int.from_bytes(b64u(epk[axis]), "big") for axis in "xy")
    z = key.exchange(ec.ECDH(), ec.EllipticCurvePublicNumbers(x, y, key.curve).public_key())
    other = b"".join(
        struct.pack(">I", len(part)) + part
        for part in (header["alg"].encode(), b64u(header.get("apu", "")), b64u(header.get("apv", "")))
    )
    return hashlib.sha256(struct.pack(">I", 1) + z + other + struct.pack(">I", 256)).digest()


def open_layer(layer: bytes, annotations: dict[str, str], key: Any) -> bytes:
    public = json.loads(base64.b64decode(annotations["org.opencontainers.image.enc.pubopts"]))
    need(public["cipher"] == "AES_256_CTR_HMAC_SHA256" and not public["cipheroptions"], "pubopts")
    for packet in annotations["org.opencontainers.image.enc.keys.jwe"].split(","):
        try:
            private = json.loads(unwrap_jwe(base64.b64decode(packet), key))
            break
        except Refused:
            continue
    else:
        raise Refused("no-key")
    symkey = base64.b64decode(private["symkey"])
    mac = hmac.new(symkey, layer, hashlib.sha256).digest()
    need(hmac.compare_digest(mac, base64.b64decode(public["hmac"])), "layer-hmac")
    nonce = base64.b64decode(private["cipheroptions"]["nonce"])
    cipher = Cipher(algorithms.AES(symkey), modes.CTR(nonce)).decryptor()
    return cipher.update(layer) + cipher.finalize()


# ---- chunks ----


@dataclass
class Blob:
    data: bytes
    codec: int
    chunks: list[tuple[int, int, int, int, int]]  # device offset, size, stored offset, stored size, flags
    keys: list[tuple[bytes, bytes]]  # d, M

    def chunk(self, index: int) -> bytes:
        _, size, offset, stored_size, flags = self.chunks[index]
        digest, m = self.keys[index]
        codec = self.codec if flags & 1 else 0
        stored = self.data[offset : offset + stored_size]
        aad = b"sealed-rafs/1" + struct.pack("<IB", size, codec)
        key = hmac.digest(m, b"key", "sha256")
        packed = AESGCM(key).decrypt(stored[:12], stored[12:], aad)
        if codec == 3:
            plain = zstandard.ZstdDecompressor().decompress(packed, max_output_size=size)
        else:
            need(codec == 0, "codec")
            plain = packed
        need(len(plain) == size and blake3(plain).digest() == digest, "chunk digest")
        nonce = hmac.digest(m, b"nonce" + aad + packed, "sha256")[:12]
        need(nonce == stored[:12], "nonce is not the one the format derives")
        return plain


def read_blob(data: bytes, meta: bytes, keys: bytes, entry: bytes, digest: str) -> Blob:
    count, codec, digester, features, size = struct.unpack_from("<IIIIQ", entry, 72)
    need(features == 0x105 and digester == 0, "blob features")
    need(
        entry[220:232] == b"SEALED\0\0" + struct.pack("<I", 1) and struct.unpack_from("<I", entry, 216)[0] == 3, "seal"
    )
    need(size == len(data), "blob size")
    magic, version, stated = struct.unpack_from("<8sII", keys)
    need((magic, version, stated) == (b"SRKEYS\0\0", 1, count), "keys header")
    need(keys[16:48].hex() == digest and len(keys) == 64 + 64 * count, "keys file")
    need(len(meta) == -(-24 * count // BLOCK) * BLOCK + BLOCK, "blob.meta size")
    need(struct.unpack_from("<I", meta, len(meta) - BLOCK)[0] == 0xB10BB10B, "CI header")
    chunks, position = [], 0
    for index in range(count):
        w0, w1, extra = struct.unpack_from("<QQQ", meta, 24 * index)
        flags = w0 >> 56
        need(extra == 0 and flags in (8, 9), "chunk flags")
        offset, stored = w1 & ((1 << 40) - 1), w1 >> 40
        need(offset == position, "chunks back to back")
        position += stored
        chunks.append(((w0 & 0xFFFFFFFF) << 12, ((w0 >> 32) & 0xFFFFFF) + 1, offset, stored, flags))
    need(position == len(data), "chunks fill the blob")
    pairs = [(keys[64 + 64 * i : 96 + 64 * i], keys[96 + 64 * i : 128 + 64 * i]) for i in range(count)]
    return Blob(data, codec, chunks, pairs)


# ---- bootstrap ----


@dataclass
class Object:
    path: str
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    nlink: int
    nid: int
    size: int = 0
    rdev: int = 0
    target: bytes = b""
    xattrs: dict[str, bytes] = field(default_factory=dict)
    pieces: list[tuple[int, int]] = field(default_factory=list)  # blob, chunk


PREFIXES = {1: b"user.", 2: b"system.posix_acl_access", 3: b"system.posix_acl_default", 4: b"trusted.", 6: b"security."}


class Tree:
    def __init__(self, boot: bytes) -> None:
        self.boot = boot
        magic, checksum, compat = struct.unpack_from("<III", boot, 1024)
        need((magic, checksum, compat) == (0xE0F5E1E2, 0, 0x40000000), "superblock")
        need(boot[1036] == 12, "block size")
        self.root = struct.unpack_from("<H", boot, 1024 + 14)[0]
        self.meta = struct.unpack_from("<I", boot, 1024 + 40)[0] * BLOCK
        need(struct.unpack_from("<I", boot, 1024 + 80)[0] == 0xC, "feature_incompat")
        flags, table, size, self.chunk_size = struct.unpack_from("<QQII", boot, 1152)
        need(flags & SEALED_FLAG and not flags & 0x0300_0000, "not a sealed bootstrap")
        self.entries = [boot[at : at + 256] for at in range(table, table + size, 256)]

    def data(self, at: int, layout: int, size: int, raw: int, head: int) -> bytes:
        full = size // BLOCK * BLOCK if layout == 2 else size
        blocks = self.boot[raw * BLOCK : raw * BLOCK + full]
        return blocks + self.boot[at + head : at + head + size - full]

    def read(self, nid: int, path: str) -> tuple[Object, bytes]:
        at = self.meta + 32 * nid
        form, icount, mode, _, size, raw, _, uid, gid, sec, nsec, nlink = struct.unpack_from(
            "<HHHHQIIIIqII", self.boot, at
        )
        need(form & 1, "compact inode")
        layout, xattr_size = form >> 1 & 7, 12 + 4 * (icount - 1) if icount else 0
        found = Object(path, mode, uid, gid, sec * 10**9 + nsec, nlink, nid)
        found.xattrs = dict(self.xattrs(at + 64 + 12, at + 64 + xattr_size)) if icount else {}
        kind = mode >> 12
        if kind == 8:
            found.size = size
            need(layout == 4, "regular file layout")
            array = -(-(at + 64 + xattr_size) // 8) * 8
            for index in range(-(-size // self.chunk_size)):
                low, device, high, _ = struct.unpack_from("<HBBI", self.boot, array + 8 * index)
                found.pieces.append((device - 1, low | high << 16))
            return found, b""
        if kind in (2, 6):
            found.rdev = raw
        content = self.data(at, layout, size, raw, 64 + xattr_size) if kind in (4, 10) else b""
        if kind == 10:
            found.target = content
        return found, content

    def xattrs(self, at: int, end: int) -> Iterator[tuple[str, bytes]]:
        while at < end:
            name_len, prefix, value_size = struct.unpack_from("<BBH", self.boot, at)
            name = PREFIXES[prefix] + self.boot[at + 4 : at + 4 + name_len]
            value = self.boot[at + 4 + name_len : at + 4 + name_len + value_size]
            yield name.decode("utf-8", "surrogateescape"), value
            at += -(-(4 + name_len + value_size) // 4) * 4

    def walk(self, nid: int | None = None, path: str = "/", above: tuple[int, ...] = ()) -> Iterator[Object]:
        nid = self.root if nid is None else nid
        need(nid not in above, "directory cycle")
        found, content = self.read(nid, path)
        yield found
        if found.mode >> 12 != 4:
            return
        for name, child, kind in dirents(content):
            if name in (b".", b".."):
                continue
            below = path.rstrip("/") + "/" + name.decode("utf-8", "surrogateescape")
            if kind == 2:
                yield from self.walk(child, below, (*above, nid))
            else:
                yield self.read(child, below)[0]


def dirents(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    for start in range(0, len(content), BLOCK):
        block = content[start : start + BLOCK]
        count = struct.unpack_from("<H", block, 8)[0] // 12
        heads = [struct.unpack_from("<QHB", block, 12 * i) for i in range(count)]
        for index, (nid, offset, kind) in enumerate(heads):
            end = heads[index + 1][1] if index + 1 < count else len(block)
            yield block[offset:end].rstrip(b"\0"), nid, kind


# ---- the image ----


def canonical(value: object) -> bytes:
    """RFC 8785 for the value types that identity.json and the config subset hold."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


class Image:
    """A sealed image; iterating yields its objects, `content` a regular file's bytes."""

    def __init__(self, layout: Path, tag: str, private_pem: bytes) -> None:
        store = Layout(layout)
        manifest = store.manifest(tag)
        public = json.loads(store.blob(manifest["config"]))
        *data, top = manifest["layers"]
        need(BOOTSTRAP in top["annotations"] and all(d["mediaType"] == NYDUS_BLOB for d in data), "layers")
        key = serialization.load_pem_private_key(private_pem, None)
        gz = open_layer(store.blob(top), top["annotations"], key)
        with tarfile.open(fileobj=io.BytesIO(zlib.decompress(gz, 31))) as archive:
            files = {m.name: archive.extractfile(m).read() for m in archive if m.isreg()}  # type: ignore[union-attr]
        identity = json.loads(files["image/identity.json"])
        need([b["digest"] for b in identity["blobs"]] == [d["digest"] for d in data], "identity-mismatch")
        subset = {k: public[k] for k in ("architecture", "os", "variant", "config") if k in public}
        need(hashlib.sha256(canonical(subset)).hexdigest() == identity["config_sha256"], "config-mismatch")
        need(public["rootfs"]["diff_ids"] == [d["digest"] for d in manifest["layers"]], "neutral diff_ids")
        self.config = json.loads(files["image/config.json"])
        self.tree = Tree(files["image/image.boot"])
        self.blobs = []
        for entry in self.tree.entries:
            name = entry[:64].decode()
            data_blob = next(store.blob(d) for d in data if d["digest"] == f"sha256:{name}")
            meta, keys = files[f"image/{name}.blob.meta"], files[f"image/{name}.keys"]
            self.blobs.append(read_blob(data_blob, meta, keys, entry, name))

    def __iter__(self) -> Iterator[Object]:
        return self.tree.walk()

    def content(self, found: Object) -> bytes:
        data = b"".join(self.blobs[blob].chunk(index) for blob, index in found.pieces)
        need(len(data) == found.size, f"size of {found.path}")
        return data


def main(layout: str, tag: str, private: str) -> None:
    image = Image(Path(layout), tag, Path(private).read_bytes())
    for found in image:
        line = {k: v for k, v in vars(found).items() if k not in ("pieces", "target", "xattrs")}
        line["target"] = found.target.decode("utf-8", "surrogateescape")
        line["xattrs"] = {name: value.hex() for name, value in sorted(found.xattrs.items())}
        if found.mode >> 12 == 8:
            line["sha256"] = hashlib.sha256(image.content(found)).hexdigest()
        print(json.dumps(line))


if __name__ == "__main__":
    main(*sys.argv[1:])
