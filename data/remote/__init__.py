"""URLs of shards in, files on this machine's disk out.

`download` fetches a URL and resumes after a broken connection; `shard_cache` keeps copies within a limit of bytes,
shared by all processes of a machine. Begin at `shard_cache.ShardCache.local`.
"""
