"""What is made of the raw numbers of bench_agent.py. Nothing here measures."""

import statistics

# Name of the ratio, name of the raw numbers. One item of these for each round; some are lists of samples.
CALLS = (
    ("calls_per_s_16", "calls_per_s_16"),
    ("cpu_per_call", "cpu_per_call_us"),
    ("cpu_per_call_1", "cpu_per_call_1_us"),
    ("rtt_p50", "rtt_us"),
    ("connect_and_ping_p50", "connect_and_ping_us"),
)
OTHERS = (("rss", "rss_bytes"), ("ready", "ready_s"))
# The original asks for statistics every 5 s and looks at its containers every 10 to 60 s: a shorter window may miss work of it.
SHORTEST_IDLE_S = 60.0


def spread(values):
    """Quartiles; of one value that three times."""
    values = sorted(values)
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def each_round(raw, name):
    return [statistics.median(item) if isinstance(item, list) else item for item in raw.get(name, ())]


def net_idle(raw, count):
    """Cores that the agent makes itself and the engine use while nothing is asked, by round."""
    both, alone = (raw.get(f"{what}_cpu_{count}", ()) for what in ("with_agent", "engine_alone"))
    return [more - less for more, less in zip(both, alone)]


def beyond_engine(raw):
    return [served - own for served, own in zip(raw.get("create_to_served_ms", ()), raw.get("engine_create_to_start_ms", ()))]


def against(raw, kind, figures):
    """`kind` divided by the Python agent, in each round; quartiles."""
    found = {}
    for name, what in figures:
        pairs = list(zip(each_round(raw.get(kind, {}), what), each_round(raw.get("python", {}), what)))
        if pairs:
            found[name] = spread([own / theirs for own, theirs in pairs])
    return found


def compare(raw, kernels, idle):
    """(quartiles by name, notes, problems): a problem is a figure that was measured and can't be true."""
    found = against(raw, "ours", (*CALLS, *OTHERS))
    notes, problems = [], []
    for count in kernels:
        nets = {kind: net_idle(raw.get(kind, {}), count) for kind in ("ours", "python")}
        if not all(nets.values()):
            continue
        if idle < SHORTEST_IDLE_S:
            notes.append(f"idle_cpu_{count} is left out: windows of {idle:g} s (--idle) are too short, {SHORTEST_IDLE_S:g} are needed")
            continue
        wrong = {kind: statistics.median(net) for kind, net in nets.items() if statistics.median(net) <= 0}
        wrong |= {"python": min(nets["python"])} if min(nets["python"]) <= 0 else {}
        for kind, net in wrong.items():
            problems.append(f"idle_cpu_{count}: {kind} and the engine used {net:.5f} cores more than the engine alone, less than the noise; take longer windows (--idle) on a quiet machine")
        if not wrong:
            found[f"idle_cpu_{count}"] = spread([own / theirs for own, theirs in zip(nets["ours"], nets["python"])])
    beyond = beyond_engine(raw.get("ours", {}))
    if beyond:
        found["create_beyond_engine_32_ports_ms"] = spread(beyond)
    return found, notes, problems


def figures(raw, kernels):
    """Quartiles of what each kind took, for tables."""
    found = {}
    for kind, of_kind in raw.items():
        found[kind] = {name: spread(each_round(of_kind, name)) for name in of_kind if of_kind[name]}
        for count in kernels:
            if net := net_idle(of_kind, count):
                found[kind][f"idle_cpu_{count}_cores"] = spread(net)
        if beyond := beyond_engine(of_kind):
            found[kind]["create_beyond_engine_32_ports_ms"] = spread(beyond)
    return found


def report(raw, kernels, idle):
    """The figures of agent.json."""
    found, notes, problems = compare(raw, kernels, idle)
    floor = against(raw, "bare", CALLS)
    middle = lambda spreads: {name: quartiles[1] for name, quartiles in spreads.items()}
    return {
        "ratios": middle(found),
        "quartiles": found,
        "floor": middle(floor),
        "floor_quartiles": floor,
        "figures": figures(raw, kernels),
        "notes": notes,
        "problems": problems,
    }
