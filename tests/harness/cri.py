"""A minimal CRI image client: what kubelet does to pull an image, without Kubernetes.

Messages are compiled from `proto/cri.proto` when first used; they are few and exist for tests only.
"""

import functools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc
import grpc_tools.protoc  # type: ignore[import-untyped]
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PROTO = Path(__file__).parent / "proto"


@functools.cache
def _messages() -> dict[str, Any]:
    with tempfile.NamedTemporaryFile() as output:
        status = grpc_tools.protoc.main(["protoc", f"-I{_PROTO}", f"--descriptor_set_out={output.name}", "cri.proto"])
        if status:
            raise RuntimeError("cri.proto does not compile")
        files = descriptor_pb2.FileDescriptorSet.FromString(output.read())
    return message_factory.GetMessages(list(files.file), pool=descriptor_pool.DescriptorPool())


class Cri:
    """ImageService and RuntimeService.Version of a socket. Failures are grpc.RpcError with containerd's text."""

    def __init__(self, address: Path) -> None:
        self._channel = grpc.insecure_channel(f"unix://{address}")

    def close(self) -> None:
        self._channel.close()

    def _call(self, service: str, method: str, timeout: float, **fields: Any) -> Any:
        request = _messages()[f"runtime.v1.{method}Request"](**fields)
        call = self._channel.unary_unary(
            f"/runtime.v1.{service}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=_messages()[f"runtime.v1.{method}Response"].FromString,
        )
        return call(request, timeout=timeout)

    def version(self) -> str:
        return str(self._call("RuntimeService", "Version", 10).runtime_version)

    def pull(self, reference: str, timeout: float = 300, auth: Mapping[str, str] | None = None) -> str:
        """Pull an image as kubelet would; returns its id."""
        return str(
            self._call(
                "ImageService", "PullImage", timeout, image={"image": reference}, **({"auth": auth} if auth else {})
            ).image_ref
        )

    def status(self, reference: str) -> Any | None:
        """The image (id, repo_tags, repo_digests, size), or None when it is not there."""
        answer = self._call("ImageService", "ImageStatus", 10, image={"image": reference})
        return answer.image if answer.HasField("image") else None

    def remove(self, reference: str) -> None:
        self._call("ImageService", "RemoveImage", 60, image={"image": reference})
