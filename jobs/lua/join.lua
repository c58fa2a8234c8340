#!lua flags=allow-oom
-- Finds the job that a waiting call made which is now made again, where there is no room for another.
--
-- KEYS[1]  prefix
-- ARGV[1]  digest of the call
--
-- Returns the batch id, or ''.

--!include common.lua
--!include joining.lua

return joined(ARGV[1]) or ''
