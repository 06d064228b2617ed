"""Who is next: modules and sessions take turns, a session keeps its order, and nobody waits for ever."""

from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prefillshare.routing.waiting import OLDEST_TURN, Entry, Line


def entry(item, module="m", session=None, priority=None, is_new=False):
    return Entry(item, module, session, priority, is_new)


def served(line, count=None):
    """The items of the next `count`, or of all, in the order they go."""
    items = []
    while (head := line.head()) is not None and (count is None or len(items) < count):
        assert line.head() is head
        line.remove(head, is_served=True)
        items.append(head.item)
    return items


def line_of(*entries):
    line = Line()
    for one in entries:
        line.add(one)
    return line


def test_modules_take_turns():
    line = line_of(*(entry(f"a{i}", "a") for i in range(3)), entry("b0", "b"), entry("b1", "b"))
    assert served(line) == ["a0", "b0", "a1", "b1", "a2"]
    assert len(line) == 0 and line.counts() == {"a": 0, "b": 0}


def test_sessions_of_a_module_take_turns_and_keep_their_own_order():
    flood = [entry(f"s{i}", session="s") for i in range(4)]
    line = line_of(*flood, entry("t0", session="t"), entry("t1", session="t"))
    assert served(line) == ["s0", "t0", "s1", "s2", "t1", "s3"]  # s2: the fourth is whoever waits longest


def test_a_running_sessions_next_turn_goes_before_a_new_session():
    line = line_of(entry("new", session="n", is_new=True), entry("next", session="r"))
    assert served(line) == ["next", "new"]


def test_a_larger_priority_goes_first_and_none_last():
    line = line_of(entry("none"), entry("low", priority=-7), entry("high", priority=3))
    assert served(line) == ["high", "low", "none"]


def test_a_module_that_is_blocked_does_not_hold_others_up():
    line = line_of(entry("a", "a"), entry("b", "b"))
    assert line.head(without={"a"}).item == "b"
    assert line.head(without={"a", "b"}) is None


def test_who_is_passed_lets_the_next_of_its_module_go_and_keeps_its_place():
    first, second, third = entry("first"), entry("second"), entry("third")
    line = line_of(first, second, third)
    assert line.head(passed=[first]) is second
    assert line.head(passed=[first, second, third]) is None
    line.remove(second, is_served=True)
    assert served(line) == ["first", "third"]


def test_who_leaves_is_gone_and_leaving_twice_changes_nothing():
    first, second = entry("first", session="s"), entry("second", session="s")
    line = line_of(first, second)
    line.remove(first, is_served=False)
    line.remove(first, is_served=False)
    assert len(line) == 1
    assert served(line) == ["second"]


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["come", "come", "serve", "leave"]),
        st.sampled_from("ab"),
        st.sampled_from([None, "s", "t", "u"]),
        st.sampled_from([None, 0, 5]),
        st.booleans(),
        st.integers(0, 50),
    ),
    max_size=60,
)


@given(EVENTS)
@settings(max_examples=300)
def test_in_any_course_of_events_each_is_served_once_and_sessions_keep_their_order(events):
    line, waiting, came, gone = Line(), {}, 0, []
    for what, module, session, priority, is_new, pick in events:
        if what == "come":
            came += 1
            waiting[came] = entry(came, module, session, priority, is_new)
            line.add(waiting[came])
        elif waiting and what == "leave":
            number = sorted(waiting)[pick % len(waiting)]
            line.remove(waiting.pop(number), is_served=False)
        elif waiting:
            head = line.head()
            line.remove(head, is_served=True)
            assert waiting.pop(head.item) is head
            gone.append(head)
        assert len(line) == len(waiting) == sum(line.counts().values())
        assert sorted(one.item for one in line) == sorted(waiting)
    while (head := line.head()) is not None:
        line.remove(head, is_served=True)
        gone.append(waiting.pop(head.item))
    assert not waiting
    for session in "stu":
        for module in "ab":
            for priority in (None, 0, 5):
                own = [
                    one.item for one in gone
                    if (one.session, one.module, one.priority) == (session, module, priority)
                ]  # fmt: skip
                assert own == sorted(own)


@given(st.lists(st.tuples(st.sampled_from([None, 0, 9]), st.booleans()), min_size=1, max_size=30))
def test_however_many_go_ahead_of_one_it_is_served_within_a_bound(others):
    """A new session without a priority, and others that come without end and all rank before it."""
    line = line_of(*(entry(i, session=f"first{i}") for i in range(3)), entry("last", session="new", is_new=True))
    for turn in range(OLDEST_TURN * 5):
        priority, is_new = others[turn % len(others)]
        line.add(entry(turn, session=f"s{turn}", priority=priority or 1, is_new=is_new))
        if served(line, 1) == ["last"]:
            return
    raise AssertionError("it still waits")
