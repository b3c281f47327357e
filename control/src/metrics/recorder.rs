//! What the agent counts of itself: calls, publications, requests.
//!
//! In: counters and histograms of the whole process. Out: their part of the page. Invariant: label
//! values are names the agent knows, never text of a peer.

use std::cell::RefCell;
use std::collections::HashMap;
use std::time::Duration;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use super::page::{Page, families, seconds};

families! {
    RPC_CALLS = Counter "backendai_rpc_requests_total" ["method"] "Calls of the manager's RPC.";
    RPC_FAILURES = Counter "backendai_rpc_failure_requests_total" ["method exception"]
        "Calls that were answered with a failure.";
    RPC_TIMES = Histogram "backendai_rpc_request_duration_seconds" ["method le"]
        "Time from a call's arrival to its reply.";
    STAT_TRIGGERS = Counter "backendai_stat_task_trigger_count_total" ["agent_id stat_scope"]
        "Rounds of statistics for the manager begun.";
    STAT_SUCCESSES = Counter "backendai_stat_task_success_count_total" ["agent_id stat_scope"]
        "Rounds whose records were stored.";
    STAT_FAILURES = Counter "backendai_stat_task_failure_count_total" ["agent_id stat_scope exception"]
        "Rounds whose records were not stored.";
    REQUESTS = Counter "backendai_api_request_count_total" ["method endpoint status_code"]
        "Requests answered by the agent's HTTP server.";
    TASKS = Gauge "backendai_async_task_count" [] "Asynchronous tasks of the agent.";
    CPU = Counter "process_cpu_seconds_total" [] "CPU time used by the agent.";
    MEMORY = Gauge "process_resident_memory_bytes" [] "Memory the agent has resident.";
    SPACE = Gauge "process_virtual_memory_bytes" [] "Address space of the agent.";
    DESCRIPTORS = Gauge "process_open_fds" [] "Descriptors the agent has open.";
    DESCRIPTOR_LIMIT = Gauge "process_max_fds" [] "Descriptors the agent may have open.";
    START = Gauge "process_start_time_seconds" [] "When the agent was started, seconds since 1970.";
}

/// The families of this module.
pub fn own_families() -> impl Iterator<Item = &'static super::Family> {
    FAMILIES.iter().copied()
}

/// Upper bounds of its buckets: the original's.
const RPC_BUCKETS: [f64; 7] = [0.1, 1.0, 10.0, 30.0, 60.0, 300.0, 600.0];

/// The process-wide counters.
#[derive(Clone, Debug)]
pub struct Recorder(PrometheusHandle);

impl Recorder {
    /// Installs the counters for this process; a second installation counts nothing and is harmless.
    ///
    /// # Errors
    /// The declared buckets are wrong, which a test excludes.
    pub fn install() -> Result<Recorder, BuildError> {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Full(RPC_TIMES.name.to_owned()), &RPC_BUCKETS)?
            .build_recorder();
        let handle = recorder.handle();
        if ::metrics::set_global_recorder(recorder).is_err() {
            tracing::debug!("counters are installed already");
        }
        for family in FAMILIES {
            match family.kind {
                super::Kind::Counter => ::metrics::describe_counter!(family.name, family.help),
                super::Kind::Gauge => ::metrics::describe_gauge!(family.name, family.help),
                super::Kind::Histogram => ::metrics::describe_histogram!(family.name, family.help),
            }
        }
        Ok(Recorder(handle))
    }

    /// Folds what was observed since; without it observations pile up between scrapes.
    pub fn upkeep(&self) {
        self.0.run_upkeep();
    }

    /// This part of the page.
    pub fn render(&self, tasks: usize) -> String {
        let mut page = Page::default();
        page.sample(&TASKS, "", u64::try_from(tasks).unwrap_or(u64::MAX));
        process(&mut page);
        self.0.render() + &page.into_text()
    }
}

/// Counts one call. `method` is a name of ours; `failure` the class of its failure.
pub fn count_call(method: &'static str, failure: Option<&str>, took: Duration) {
    if let Some(class) = failure {
        ::metrics::counter!(RPC_FAILURES.name, "method" => method, "exception" => class.to_owned())
            .increment(1);
    }
    // To look its counters up in the recorder each time costs as much as to answer a call.
    thread_local! {
        static KNOWN: RefCell<HashMap<&'static str, (::metrics::Counter, ::metrics::Histogram)>> =
            RefCell::default();
    }
    KNOWN.with_borrow_mut(|known| {
        let (calls, times) = known.entry(method).or_insert_with(|| {
            (
                ::metrics::counter!(RPC_CALLS.name, "method" => method),
                ::metrics::histogram!(RPC_TIMES.name, "method" => method),
            )
        });
        calls.increment(1);
        times.record(took.as_secs_f64());
    });
}

/// Counts one round of statistics in each of the scopes.
pub fn count_round(agent_id: &str, scopes: &[&'static str], stage: Round) {
    for scope in scopes {
        let agent_id = agent_id.to_owned();
        match stage {
            Round::Begun => ::metrics::counter!(STAT_TRIGGERS.name, "agent_id" => agent_id, "stat_scope" => *scope),
            Round::Stored => ::metrics::counter!(STAT_SUCCESSES.name, "agent_id" => agent_id, "stat_scope" => *scope),
            Round::Failed(why) => ::metrics::counter!(STAT_FAILURES.name, "agent_id" => agent_id, "stat_scope" => *scope, "exception" => why),
        }
        .increment(1);
    }
}

/// How a round of statistics stands.
#[derive(Clone, Copy, Debug)]
pub enum Round {
    /// It begins.
    Begun,
    /// Its records are stored.
    Stored,
    /// They are not, because of this.
    Failed(&'static str),
}

/// Counts one HTTP request.
pub fn count_request(method: &'static str, endpoint: &'static str, status: u16) {
    ::metrics::counter!(REQUESTS.name, "method" => method, "endpoint" => endpoint, "status_code" => status.to_string())
        .increment(1);
}

/// The usual series of a process.
fn process(page: &mut Page) {
    let tick_ns = 1_000_000_000 / rustix::param::clock_ticks_per_second().max(1);
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let stat = text("/proc/self/stat");
    // The name, in parentheses, may hold anything.
    let fields: Vec<u64> = stat
        .rsplit(')')
        .next()
        .unwrap_or_default()
        .split_whitespace()
        .map(|word| word.parse().unwrap_or(0))
        .collect();
    // proc(5): the third field is the first after the name.
    let field = |number: usize| fields.get(number - 3).copied();
    if let (Some(user), Some(system)) = (field(14), field(15)) {
        page.sample(&CPU, "", seconds((user + system).saturating_mul(tick_ns)));
    }
    if let Some(pages) = field(24) {
        let size = u64::try_from(rustix::param::page_size()).unwrap_or(4096);
        page.sample(&MEMORY, "", pages.saturating_mul(size));
    }
    page.measured(&SPACE, "", field(23));
    let open = std::fs::read_dir("/proc/self/fd").map(Iterator::count).ok();
    page.measured(
        &DESCRIPTORS,
        "",
        open.and_then(|count| u64::try_from(count).ok()),
    );
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    page.measured(&DESCRIPTOR_LIMIT, "", limit);
    let boot = text("/proc/stat")
        .lines()
        .find_map(|line| line.strip_prefix("btime "))
        .and_then(|word| word.trim().parse::<u64>().ok());
    if let (Some(boot), Some(ticks)) = (boot, field(22)) {
        let since_boot = Duration::from_nanos(ticks.saturating_mul(tick_ns));
        let start = Duration::from_secs(boot) + since_boot;
        page.sample(&START, "", start.as_secs_f64());
    }
}
