# SPDX-License-Identifier: Apache-2.0
"""Keys, and the scripts for what must happen in Redis all at once or not at all."""

from __future__ import annotations

# The braces keep all keys in one slot of a Redis cluster.
PREFIX = "{frostline}:"
MARKER = PREFIX + "marker"  # who first wrote here: gone when the data is gone
EPOCH = PREFIX + "epoch"
POLICY_CURRENT = PREFIX + "policy:current"
POLICY_DOCUMENT = PREFIX + "policy:"  # + version: hash of document, author, comment, created_at_unix_ns
FREEZES = PREFIX + "freezes"  # hash: what is frozen -> JSON
DECISIONS = PREFIX + "decisions"  # stream
AUDIT = PREFIX + "audit"  # stream
HOST = PREFIX + "host:"  # + node id, with a time to live
BUDGETS = PREFIX + "budgets:"  # + node id
CONTROLLER = PREFIX + "controller:"  # + controller id, with a time to live

MAX_DECISIONS = 100_000
MAX_AUDIT = 10_000
MAX_POLICIES = 500

# KEYS marker, epoch, policy:current, freezes. ARGV our id, our epoch (0: none yet), epoch to be above (or 0).
# Gives a new epoch where one is needed, never lets the stored one fall below ours, and says what is stored.
RECONCILE = """
local marker = redis.call('GET', KEYS[1])
local fresh = 0
if not marker then
  marker = ARGV[1]
  fresh = 1
  redis.call('SET', KEYS[1], marker)
end
local stored = tonumber(redis.call('GET', KEYS[2]) or '0') or 0
local mine, above = tonumber(ARGV[2]), tonumber(ARGV[3])
if mine == 0 or above > mine then
  mine = math.max(stored, mine, above) + 1
end
if stored < mine then
  redis.call('SET', KEYS[2], string.format('%.0f', mine))
end
local current = redis.call('GET', KEYS[3]) or '0'
return {marker, fresh, string.format('%.0f', mine), current, redis.call('HGETALL', KEYS[4])}
"""

# KEYS policy:current, audit. ARGV expected (0: any), document key prefix, document, author, comment, time, how many
# versions to keep, how many audit entries to keep, the version in force at the caller. Returns {1, new version},
# {0, version in force}, or {-1, version stored}: it is behind the caller's, and the next number was given before.
PUT_POLICY = """
local current = tonumber(redis.call('GET', KEYS[1]) or '0') or 0
local expected = tonumber(ARGV[1])
if current < tonumber(ARGV[9]) then
  return {-1, string.format('%.0f', current)}
end
if expected ~= 0 and expected ~= current then
  return {0, string.format('%.0f', current)}
end
local version = string.format('%.0f', current + 1)
redis.call('HSET', ARGV[2] .. version, 'document', ARGV[3], 'author', ARGV[4], 'comment', ARGV[5],
  'created_at_unix_ns', ARGV[6])
redis.call('SET', KEYS[1], version)
redis.call('DEL', ARGV[2] .. string.format('%.0f', current + 1 - tonumber(ARGV[7])))
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[8], '*', 'action', 'policy.put', 'author', ARGV[4],
  'policy_version', version, 'comment', ARGV[5], 'at_unix_ns', ARGV[6])
return {1, version}
"""

# KEYS policy:current. ARGV version, document key prefix, document, author, comment, time.
# Puts a document back under its old number, unless something newer is there. Returns the version in force.
PUT_BACK_POLICY = """
local current = tonumber(redis.call('GET', KEYS[1]) or '0') or 0
local version = tonumber(ARGV[1])
if current >= version then
  return string.format('%.0f', current)
end
redis.call('HSET', ARGV[2] .. ARGV[1], 'document', ARGV[3], 'author', ARGV[4], 'comment', ARGV[5],
  'created_at_unix_ns', ARGV[6])
redis.call('SET', KEYS[1], ARGV[1])
return ARGV[1]
"""
