"""blobd's numbers as metrics."""

from collections.abc import Mapping
from typing import Any

from snapshotter.monitor.exposition import Family, by, counter, gauge, histogram

MOST_IMAGES = 64  # shown one by one: those attached last

_COUNTERS = {
    "reads": ("coco_reads_total", "Reads of blob devices by the kernel."),
    "hits": ("coco_read_hits_total", "Reads that were answered with what is on this machine."),
    "misses": ("coco_read_misses_total", "Reads that had to wait for a registry."),
    "requests": ("coco_registry_requests_total", "Ranges asked of registries."),
    "fetched_bytes": ("coco_fetched_bytes_total", "Bytes of chunks that came from registries."),
    "retries": ("coco_refetches_total", "Chunks fetched again because they failed verification."),
    "verify_failures": ("coco_verify_failures_total", "Chunks that were not what their image says."),
    "evictions": ("coco_cache_evictions_total", "Chunks removed from the cache to make room."),
    "cache_errors": ("coco_cache_errors_total", "Chunks that could not be written to the cache."),
}
_OF_IMAGES = {
    "reads": ("coco_image_reads_total", "Reads of one image."),
    "misses": ("coco_image_read_misses_total", "Reads of one image that had to wait for a registry."),
    "fetched_bytes": ("coco_image_fetched_bytes_total", "Bytes of one image that came from registries."),
}


def families(found: Mapping[str, Any] | None, names: Mapping[int, str]) -> list[Family]:
    """`found` is what blobd says, None if it says nothing; `names` are references by attach id."""
    told = found or {}
    counters = told.get("counters", {})

    def one(value: float | None) -> list[tuple[dict[str, str], float]]:
        return [] if value is None else [({}, value)]

    cache = told.get("cache", {})
    images = sorted(told.get("images", []), key=lambda image: -int(image["id"]))[:MOST_IMAGES]
    return [
        *(counter(name, text, one(counters.get(key))) for key, (name, text) in _COUNTERS.items()),
        counter("coco_read_errors_total", "Reads answered with EIO, by cause.", by(["cause"], told.get("causes", []))),
        counter(
            "coco_fuse_failures_total",
            "Requests of the kernel answered with an error, by operation and errno.",
            by(["operation", "errno"], told.get("failures", [])),
        ),
        gauge("coco_reads_in_flight", "Requests of the kernel taken and not answered.", one(told.get("in_flight"))),
        gauge("coco_reads_parked", "Reads that wait for a registry now.", one(told.get("parked"))),
        gauge(
            "coco_oldest_read_seconds",
            "For how long the oldest of them has waited: is a read stuck?",
            one(told.get("oldest_seconds")),
        ),
        histogram("coco_read_wait_seconds", "For how long reads waited for a registry.", [], told.get("waits", [])),
        histogram(
            "coco_fetch_duration_seconds",
            "How long ranges took to come from registries, by outcome.",
            ["outcome"],
            told.get("fetches", []),
        ),
        counter(
            "coco_host_failures_total",
            "Requests for ranges that a registry or mirror did not serve, by host and reason.",
            by(["host", "reason"], told.get("hosts", [])),
        ),
        histogram(
            "coco_decode_duration_seconds",
            "How long chunks took to be authenticated, decrypted, decompressed and checked.",
            [],
            told.get("decodes", []),
        ),
        gauge("coco_cache_bytes", "Bytes of chunks in the cache.", one(cache.get("bytes"))),
        gauge("coco_cache_entries", "Chunks in the cache.", one(cache.get("entries"))),
        gauge("coco_cache_quota_bytes", "Most bytes that the cache may hold.", one(cache.get("quota"))),
        gauge("coco_open_files", "Files that the kernel has open on blob devices.", one(told.get("open_files"))),
        gauge("coco_images_attached", "Images that blobd serves.", one(len(told["images"]) if told else None)),
        *(
            counter(
                name,
                text,
                [
                    (
                        {"id": str(image["id"]), "image": names.get(int(image["id"]), "")},
                        image["counters"].get(key, 0),
                    )
                    for image in images
                ],
            )
            for key, (name, text) in _OF_IMAGES.items()
        ),
    ]
