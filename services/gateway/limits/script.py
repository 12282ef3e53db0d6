"""What Redis runs for each decision: one step for all limits of a request, by Redis's own time.

Each limit has two keys: a hash with its value (what a bucket holds, or what was used), when that was, the sum
of what is reserved and the amount of each reservation; and a sorted set of reservations by when they expire.
Both expire themselves, so that nothing stays of a caller who has left.

Arguments: what to do, the reservation's id, how long it holds in milliseconds; then for each limit whether it
is a rate, how much there is, the amount, how long its keys shall live, the value where Redis has none, and
what is owed from a time without Redis. Returns whether it was allowed, then value and reserved sum of each
limit.
"""

from __future__ import annotations

from services.gateway.redis import Script

SCRIPT = Script("""
local what, id, hold_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local function text(number)
  return string.format('%.17g', number)
end

local function load(index)
  local first = 3 + (index - 1) * 6
  local limit = {
    key = KEYS[index * 2 - 1],
    holds = KEYS[index * 2],
    is_rate = ARGV[first + 1] == '1',
    limit = tonumber(ARGV[first + 2]),
    amount = tonumber(ARGV[first + 3]),
    ttl_ms = tonumber(ARGV[first + 4]),
  }
  local start, owed = tonumber(ARGV[first + 5]), tonumber(ARGV[first + 6])
  local state = redis.call('HMGET', limit.key, 'value', 'at', 'reserved')
  limit.value = tonumber(state[1] or start)
  limit.reserved = tonumber(state[3] or 0)
  if limit.is_rate then
    local elapsed_ms = math.max(0, now - tonumber(state[2] or now))
    limit.value = math.min(limit.limit, limit.value + elapsed_ms * limit.limit / 60000)
    if owed > 0 then
      limit.value = math.min(limit.value, start)
    end
  else
    limit.value = limit.value + owed
  end
  local gone = redis.call('ZRANGEBYSCORE', limit.holds, '-inf', now, 'LIMIT', 0, 100)
  if #gone > 0 then
    for _, amount in ipairs(redis.call('HMGET', limit.key, unpack(gone))) do
      limit.reserved = limit.reserved - tonumber(amount or 0)
      if limit.is_rate then
        limit.value = math.min(limit.limit, limit.value + tonumber(amount or 0))
      end
    end
    redis.call('HDEL', limit.key, unpack(gone))
    redis.call('ZREM', limit.holds, unpack(gone))
  end
  return limit
end

local function save(limit)
  local reserved = text(math.max(0, limit.reserved))
  redis.call('HSET', limit.key, 'value', text(limit.value), 'at', text(now), 'reserved', reserved)
  for _, key in ipairs({limit.key, limit.holds}) do
    if redis.call('PTTL', key) < limit.ttl_ms then
      redis.call('PEXPIRE', key, limit.ttl_ms)
    end
  end
end

local limits, allowed = {}, 1
for index = 1, #KEYS / 2 do
  local limit = load(index)
  limits[index] = limit
  if limit.is_rate then
    if limit.value < limit.amount then
      allowed = 0
    end
  elseif limit.value + limit.reserved + limit.amount > limit.limit then
    allowed = 0
  end
end

for _, limit in ipairs(limits) do
  local held = tonumber(redis.call('HGET', limit.key, id) or nil)
  if what == 'reserve' and allowed == 1 then
    redis.call('HSET', limit.key, id, text(limit.amount))
    redis.call('ZADD', limit.holds, now + hold_ms, id)
    limit.reserved = limit.reserved + limit.amount
    if limit.is_rate then
      limit.value = limit.value - limit.amount
    end
  elseif what == 'correct' and held then
    redis.call('HSET', limit.key, id, text(limit.amount))
    limit.reserved = limit.reserved + limit.amount - held
    if limit.is_rate then
      limit.value = limit.value + held - limit.amount
    end
  elseif what == 'settle' then
    if held then
      redis.call('HDEL', limit.key, id)
      redis.call('ZREM', limit.holds, id)
      limit.reserved = limit.reserved - held
    end
    if limit.is_rate then
      limit.value = math.min(limit.limit, limit.value + (held or 0) - limit.amount)
    else
      limit.value = limit.value + limit.amount
    end
  end
  save(limit)
end

local answer = {allowed}
for _, limit in ipairs(limits) do
  answer[#answer + 1] = text(limit.value)
  answer[#answer + 1] = text(limit.reserved)
end
return answer
""")
