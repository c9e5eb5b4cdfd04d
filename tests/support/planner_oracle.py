#!/usr/bin/env python3
"""Makes tests/planner/oracle.txt: when schedules are due around every shift of the clocks in 2026 and 2027.

    python3 tests/support/planner_oracle.py > tests/planner/oracle.txt

This takes some minutes; with names of zones as arguments it prints their part alone.

It shares no code and no idea with the planner (src/jobs/schedule.rs), which asks croner for local times and looks for
their instants. This walks through all minutes of UTC, asks zoneinfo what the clocks of the zone show in each, and
compares that with the pattern:

- a minute that matches is due; but where the pattern names fixed times (plain numbers in second, minute and hour) and
  the clocks show that minute for the second time, it is not: it ran at the first;
- where the clocks jump forward, each minute that they leave out and that matches makes the first instant after the gap
  due; but not for a pattern that runs in all 24 hours, which is an interval: a gap takes nothing from its rhythm.

Zones whose clocks are shifted alike are one group. Zones without a shift in these two years are left out. The names and
rules are those of the system's tz database, which must be the release that chrono-tz has, else the two may differ for
reasons that are none of the planner's: both are 2025b here (/usr/share/zoneinfo/tzdata.zi, first line, and
chrono_tz::IANA_TZDB_VERSION, which the test compares with the table's first line).
"""

import sys
from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo, available_timezones

START = datetime(2026, 1, 1, tzinfo=timezone.utc)
END = datetime(2028, 1, 1, tzinfo=timezone.utc)
MINUTE = timedelta(minutes=1)

# Names of the system that are no zones of the database.
NO_ZONES = {"localtime", "posixrules", "Factory", "build/etc/localtime"}

# Each with the hours before and after a shift for which it is listed; None: both years in one piece.
PATTERNS = [
    ("0 30 2 * * *", 48),
    ("0 0 3 * * *", 48),
    ("0 30 23 * * *", 48),
    ("0 30 0 * * *", 48),
    ("15 45 1,2 * * *", 48),
    ("0 */15 * * * *", 3),
    ("0 30 * * * *", 6),
    ("0 20 */2 * * *", 24),
    ("0 10-59/25 1-3 * * *", 30),
    ("0 */20 0,23 * * *", 30),
    ("0 0 0-6 * * 0", 48),
    ("0 15 2 * * MON-FRI", 72),
    ("0 30 1 L * *", None),
    ("0 45 2 * * 0#1", None),
    ("0 0,30 2 8-14 3,11 *", None),
]
DAYS = ["SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"]


def values(field, low, high):
    """The numbers that a field names."""
    found = set()
    for item in field.split(","):
        span, _, step = item.partition("/")
        if span == "*":
            first, last = low, high
        elif "-" in span:
            first, last = map(int, span.split("-"))
        else:
            first, last = int(span), int(span)
        found.update(range(first, last + 1, int(step or 1)))
    return found


class Pattern:
    def __init__(self, text):
        second, minute, hour, day, month, weekday = text.split()
        self.second = int(second)
        self.minutes, self.hours = values(minute, 0, 59), values(hour, 0, 23)
        self.is_fixed = all(c.isdigit() or c == "," for c in second + minute + hour)
        self.is_interval = len(self.hours) == 24
        self.is_last_day = day == "L"
        self.days = set() if self.is_last_day else values(day, 1, 31)
        self.months = values(month, 1, 12)
        weekday, _, self.nth = weekday.partition("#")
        for number, name in enumerate(DAYS):
            weekday = weekday.replace(name, str(number))
        self.weekdays = values(weekday, 0, 6)

    def matches(self, local):
        """Whether the pattern names this minute of a wall clock."""
        if local.minute not in self.minutes or local.hour not in self.hours or local.month not in self.months:
            return False
        if self.is_last_day:
            is_day = (local + timedelta(days=1)).month != local.month
        else:
            is_day = local.day in self.days
        is_nth = not self.nth or (local.day - 1) // 7 + 1 == int(self.nth)
        return is_day and is_nth and local.isoweekday() % 7 in self.weekdays


def wall_clock(zone, start, end):
    """Each minute after `start` until `end` with what the clocks show then, and what they left out before it."""
    at = start
    before = at.astimezone(zone).replace(tzinfo=None)
    while at < end:
        at += MINUTE
        shown = at.astimezone(zone)
        local = shown.replace(tzinfo=None, fold=0)
        left_out = []
        missing = before + MINUTE
        while missing < local:
            left_out.append(missing)
            missing += MINUTE
        yield at, local, shown.fold == 1, left_out
        before = local


def due(pattern, minutes, start, end):
    found = set()
    for at, local, is_second_time, left_out in minutes:
        if pattern.matches(local) and not (pattern.is_fixed and is_second_time):
            found.add(at + timedelta(seconds=pattern.second))
        if not pattern.is_interval and any(pattern.matches(minute) for minute in left_out):
            found.add(at)
    return sorted(at for at in found if start < at <= end)


def shifts(zone):
    """Each instant at which the clocks are shifted, with the offset before and after it, in seconds."""

    def offset(at):
        return int(at.astimezone(zone).utcoffset().total_seconds())

    found = []
    at = START
    while at < END:
        later = at + timedelta(hours=1)
        if offset(at) != offset(later):
            minute = at
            while offset(minute) == offset(at):
                minute += MINUTE
            found.append((minute, offset(at), offset(later)))
        at = later
    return tuple(found)


def main():
    with open("/usr/share/zoneinfo/tzdata.zi") as file:
        release = file.readline().split()[-1]
    groups = {}
    for name in sys.argv[1:] or sorted(available_timezones() - NO_ZONES):
        found = shifts(ZoneInfo(name))
        if found:
            groups.setdefault(found, []).append(name)
    print(f"release {release}")
    print("# Made by tests/support/planner_oracle.py. A group is a line of zones; then, for each pattern and window:")
    print("# pattern | begin of the window | end, and the due times in it, all in seconds after the begin")
    for found, names in sorted(groups.items(), key=lambda group: group[1]):
        zone = ZoneInfo(names[0])
        print("zones", *names)
        years = list(wall_clock(zone, START, END))
        for text, hours in PATTERNS:
            pattern = Pattern(text)
            if hours is None:
                windows = [(START, END)]
            else:
                around = timedelta(hours=hours)
                windows = [(at - around, at + around) for at, _, _ in found]
            for start, end in windows:
                # `years` begins with the minute after START. That in which the window begins may be due later in it.
                first = int((start - START) / MINUTE) - 1
                minutes = years[max(first, 0) : int((end - START) / MINUTE)]
                times = [int((at - start).total_seconds()) for at in due(pattern, minutes, start, end)]
                print(f"{text} | {start:%Y-%m-%dT%H:%M:%SZ} | {int((end - start).total_seconds())}", *times)


if __name__ == "__main__":
    sys.exit(main())
