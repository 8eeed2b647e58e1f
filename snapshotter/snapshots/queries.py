"""The longer queries of `store`."""

_FROM = "FROM snapshot s LEFT JOIN snapshot p ON p.id = s.parent_id"
COLUMNS = (
    "s.id, s.name, s.parent_id, s.kind, s.created_ns, s.updated_ns, s.size, s.inodes, s.ref, ifnull(p.name, '') "
    f"{_FROM}"
)
INFO_COLUMNS = f"s.id, s.name, ifnull(p.name, ''), s.kind, s.created_ns, s.updated_ns {_FROM}"
USERS = """
WITH RECURSIVE above (image, id) AS (
    SELECT id, id FROM image
    UNION ALL
    SELECT image, s.id FROM above JOIN snapshot s ON s.parent_id = above.id WHERE s.id NOT IN (SELECT id FROM image)
)
SELECT image, name FROM above JOIN snapshot USING (id) WHERE kind <> 3 ORDER BY id
"""
CHAIN = """
WITH RECURSIVE chain (depth, id) AS (
    VALUES (0, ?)
    UNION ALL
    SELECT depth + 1, parent_id FROM chain JOIN snapshot USING (id) WHERE parent_id IS NOT NULL
)
SELECT s.id, s.name, s.ref, i.record
FROM chain JOIN snapshot s USING (id) LEFT JOIN image i USING (id) ORDER BY depth
"""
DESCENDANTS = """
WITH RECURSIVE above (id) AS (
    SELECT id FROM snapshot WHERE parent_id = ?
    UNION ALL
    SELECT s.id FROM above JOIN snapshot s ON s.parent_id = above.id
)
SELECT id FROM above JOIN label ON snapshot_id = id WHERE key = ?
"""
