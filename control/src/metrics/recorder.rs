//! What the agent counts of itself: calls, publications, comparisons, background tasks, requests.
//!
//! In: counters and histograms of the whole process. Out: their part of the page. Invariant: label
//! values are names the agent knows, never text of a peer.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};

use shared::procfs::tick_ns;

use super::page::{Family, Page, families, seconds};

families! {
    RPC_CALLS = Counter "backendai_rpc_requests_total" ["method"] "Calls of the manager's RPC.";
    RPC_FAILURES = Counter "backendai_rpc_failure_requests_total" ["method exception"]
        "Calls that were answered with a failure; also those refused before they began, which are not \
         counted as calls, and those whose caller left (CancelledError).";
    RPC_TIMES = Histogram "backendai_rpc_request_duration_seconds" ["method le"]
        "Time from a call's arrival to its reply.";
    STAT_TRIGGERS = Counter "backendai_stat_task_trigger_count_total" ["agent_id stat_scope"]
        "Rounds of statistics for the manager begun.";
    STAT_SUCCESSES = Counter "backendai_stat_task_success_count_total" ["agent_id stat_scope"]
        "Rounds whose records were stored.";
    STAT_FAILURES = Counter "backendai_stat_task_failure_count_total" ["agent_id stat_scope exception"]
        "Rounds whose records were not stored.";
    SYNC_TRIGGERS = Counter "backendai_sync_container_lifecycle_trigger_count_total" ["agent_id"]
        "Comparisons of kernels with the engine's containers begun.";
    SYNC_SUCCESSES = Counter "backendai_sync_container_lifecycle_success_count_total" ["agent_id"]
        "Kernels and containers that such comparisons found without the other, and dealt with.";
    SYNC_FAILURES = Counter "backendai_sync_container_lifecycle_failure_count_total" ["agent_id exception"]
        "Such comparisons that failed.";
    BGTASKS = Gauge "backendai_bgtask_count" ["task_name"] "Background tasks under way.";
    BGTASKS_DONE = Counter "backendai_bgtask_done_count_total" ["task_name status domain operation error_detail"]
        "Background tasks that have ended.";
    BGTASK_TIMES = Histogram "backendai_bgtask_processing_time_sec" ["task_name status domain operation error_detail le"]
        "Time from a background task's start to its end, seconds.";
    REQUESTS = Counter "backendai_api_request_count_total" ["method endpoint domain operation error_detail status_code"]
        "Requests answered by the agent's HTTP server.";
    REQUEST_TIMES = Histogram "backendai_api_request_duration_sec" ["method endpoint domain operation error_detail status_code le"]
        "Time from a request's arrival to its answer, seconds.";
    TASKS = Gauge "backendai_async_task_count" [] "Asynchronous tasks of the agent.";
    CPU_PERCENT = Gauge "backendai_cpu_usage_percent" [] "CPU the agent has used since the last scrape, or since one before that where scrapes come within a second, in percent of one core.";
    RSS = Gauge "backendai_memory_used_rss" [] "Memory the agent has resident, bytes.";
    VMS = Gauge "backendai_memory_used_vms" [] "Address space of the agent, bytes.";
    CPU = Counter "process_cpu_seconds_total" [] "CPU time used by the agent.";
    MEMORY = Gauge "process_resident_memory_bytes" [] "Memory the agent has resident.";
    SPACE = Gauge "process_virtual_memory_bytes" [] "Address space of the agent.";
    DESCRIPTORS = Gauge "process_open_fds" [] "Descriptors the agent has open.";
    DESCRIPTOR_LIMIT = Gauge "process_max_fds" [] "Descriptors the agent may have open.";
    START = Gauge "process_start_time_seconds" [] "When the agent was started, seconds since 1970.";
}

/// Upper bounds of their buckets, seconds: the original's.
const BUCKETS: [(&Family, &[f64]); 3] = [
    (&RPC_TIMES, &[0.1, 1.0, 10.0, 30.0, 60.0, 300.0, 600.0]),
    (&BGTASK_TIMES, &[0.1, 1.0, 10.0, 30.0, 60.0, 300.0, 600.0]),
    (
        &REQUEST_TIMES,
        &[0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0],
    ),
];
/// CPU time is told over this long at least, but in the process's first second: Linux counts it in hundredths
/// of a second.
const CPU_SPAN: Duration = Duration::from_secs(1);

/// The process-wide counters.
#[derive(Clone, Debug)]
pub struct Recorder {
    handle: PrometheusHandle,
    /// At two scrapes [`CPU_SPAN`] or more apart (at first, at the start): when, and the CPU time until then,
    /// ns.
    cpu: Arc<Mutex<[(Instant, u64); 2]>>,
}

impl Recorder {
    /// Installs the counters for this process; a second installation counts nothing and is harmless.
    ///
    /// # Errors
    /// The declared buckets are wrong, which a test excludes.
    pub fn install() -> Result<Recorder, BuildError> {
        let mut builder = PrometheusBuilder::new();
        for (family, buckets) in BUCKETS {
            let name = Matcher::Full(family.name.to_owned());
            builder = builder.set_buckets_for_metric(name, buckets)?;
        }
        let recorder = builder.build_recorder();
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
        let used = Stat::read().cpu_ns().unwrap_or_default();
        Ok(Recorder {
            handle,
            cpu: Arc::new(Mutex::new([(Instant::now(), used); 2])),
        })
    }

    /// Folds what was observed since; without it observations pile up between scrapes.
    pub fn upkeep(&self) {
        self.handle.run_upkeep();
    }

    /// This part of the page.
    pub fn render(&self, tasks: usize) -> String {
        let mut page = Page::default();
        page.sample(&TASKS, "", u64::try_from(tasks).unwrap_or(u64::MAX));
        let stat = Stat::read();
        let percent = stat.cpu_ns().and_then(|used| {
            // Whole after every statement.
            let mut marks = self.cpu.lock().unwrap_or_else(PoisonError::into_inner);
            cpu_percent(&mut marks, (Instant::now(), used))
        });
        page.measured(&CPU_PERCENT, "", percent);
        page.measured(&RSS, "", stat.resident());
        page.measured(&VMS, "", stat.field(23));
        process(&mut page, &stat);
        self.handle.render() + &page.into_text()
    }
}

/// CPU of a process in percent of one core from the last of `marks` that is [`CPU_SPAN`] ago until `now`, by
/// its CPU time, ns. `now` becomes a mark where that leaves one that is long enough ago.
fn cpu_percent(marks: &mut [(Instant, u64); 2], now: (Instant, u64)) -> Option<f64> {
    let [_, later] = *marks;
    if now.0.saturating_duration_since(later.0) >= CPU_SPAN {
        *marks = [later, now];
    }
    let (then, before) = marks[0];
    let span = now.0.saturating_duration_since(then);
    let spent = Duration::from_nanos(now.1.saturating_sub(before));
    (!span.is_zero()).then(|| 100.0 * spent.as_secs_f64() / span.as_secs_f64())
}

/// Counts one call. `method` is a name of ours; `failure` the class of its failure.
pub fn count_call(method: &'static str, failure: Option<&str>, took: Duration) {
    if let Some(class) = failure {
        count_failure(method, class);
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

/// Counts a call that failed, or was refused before it began.
pub fn count_failure(method: &'static str, class: &str) {
    ::metrics::counter!(RPC_FAILURES.name, "method" => method, "exception" => class.to_owned())
        .increment(1);
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

/// Counts a comparison of kernels with containers that begins.
pub fn count_sync(agent_id: &str) {
    ::metrics::counter!(SYNC_TRIGGERS.name, "agent_id" => agent_id.to_owned()).increment(1);
}

/// Counts one that has ended: how much was dealt with, or the class of its failure.
pub fn count_sync_end(agent_id: &str, ended: Result<usize, &'static str>) {
    let agent_id = agent_id.to_owned();
    match ended {
        Ok(count) => ::metrics::counter!(SYNC_SUCCESSES.name, "agent_id" => agent_id)
            .increment(u64::try_from(count).unwrap_or(u64::MAX)),
        Err(why) => {
            ::metrics::counter!(SYNC_FAILURES.name, "agent_id" => agent_id, "exception" => why)
                .increment(1);
        }
    }
}

/// How a background task has ended.
#[derive(Clone, Copy, Debug)]
pub enum TaskEnd {
    /// Its work is done.
    Done,
    /// It is not, and will not be.
    Failed,
    /// The agent stops.
    Cancelled,
}

/// Counts a background task that begins. `name` is a name of ours.
pub fn count_task(name: &'static str) {
    ::metrics::gauge!(BGTASKS.name, "task_name" => name).increment(1.0);
}

/// Counts one that has ended, after `took`.
pub fn count_task_end(name: &'static str, end: TaskEnd, took: Duration) {
    let (status, [domain, operation, detail]) = match end {
        TaskEnd::Done => ("bgtask_done", [""; 3]),
        TaskEnd::Failed => ("bgtask_failed", ["bgtask", "execute", "internal-error"]),
        TaskEnd::Cancelled => ("bgtask_cancelled", ["bgtask", "execute", "canceled"]),
    };
    ::metrics::gauge!(BGTASKS.name, "task_name" => name).decrement(1.0);
    ::metrics::counter!(BGTASKS_DONE.name, "task_name" => name, "status" => status, "domain" => domain, "operation" => operation, "error_detail" => detail)
        .increment(1);
    ::metrics::histogram!(BGTASK_TIMES.name, "task_name" => name, "status" => status, "domain" => domain, "operation" => operation, "error_detail" => detail)
        .record(took.as_secs_f64());
}

/// Counts one HTTP request, answered after `took`.
pub fn count_request(method: &'static str, endpoint: &'static str, status: u16, took: Duration) {
    let [domain, operation, detail] = match status {
        400.. => ["backendai", "generic", "internal-error"],
        _ => [""; 3],
    };
    let status = status.to_string();
    ::metrics::counter!(REQUESTS.name, "method" => method, "endpoint" => endpoint, "domain" => domain, "operation" => operation, "error_detail" => detail, "status_code" => status.clone())
        .increment(1);
    ::metrics::histogram!(REQUEST_TIMES.name, "method" => method, "endpoint" => endpoint, "domain" => domain, "operation" => operation, "error_detail" => detail, "status_code" => status)
        .record(took.as_secs_f64());
}

/// What Linux says of this process in `/proc/self/stat`.
struct Stat(Vec<u64>);

impl Stat {
    fn read() -> Stat {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // The name, in parentheses, may hold anything.
        let fields = stat.rsplit(')').next().unwrap_or_default();
        let fields = fields.split_whitespace();
        Stat(fields.map(|word| word.parse().unwrap_or(0)).collect())
    }

    /// By its number in proc(5), from 3 on: the third is the first after the name.
    fn field(&self, number: usize) -> Option<u64> {
        self.0.get(number.checked_sub(3)?).copied()
    }

    fn cpu_ns(&self) -> Option<u64> {
        let ticks = self.field(14)?.saturating_add(self.field(15)?);
        Some(ticks.saturating_mul(tick_ns()))
    }

    fn resident(&self) -> Option<u64> {
        let size = u64::try_from(rustix::param::page_size()).unwrap_or(4096);
        Some(self.field(24)?.saturating_mul(size))
    }
}

/// The usual series of a process.
fn process(page: &mut Page, stat: &Stat) {
    let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    if let Some(used) = stat.cpu_ns() {
        page.sample(&CPU, "", seconds(used));
    }
    page.measured(&MEMORY, "", stat.resident());
    page.measured(&SPACE, "", stat.field(23));
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
    if let (Some(boot), Some(ticks)) = (boot, stat.field(22)) {
        let since_boot = Duration::from_nanos(ticks.saturating_mul(tick_ns()));
        let start = Duration::from_secs(boot) + since_boot;
        page.sample(&START, "", start.as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_in_percent_is_told_over_a_second_at_least() {
        let start = Instant::now();
        let mut marks = [(start, 0); 2];
        // Milliseconds since the start, CPU time in ms until then, percent.
        for (at, used, percent) in [
            (0, 0, None),
            (500, 250, Some(50.0)),
            (10_000, 1000, Some(10.0)),
            // Of a scraper beside: hundredths of a second are much of so short a time.
            (10_010, 1010, Some(100.0 * 1010.0 / 10_010.0)),
            (20_000, 6000, Some(50.0)),
            (20_500, 6000, Some(100.0 * 5000.0 / 10_500.0)),
            (21_000, 6000, Some(0.0)),
        ] {
            let now = (start + Duration::from_millis(at), used * 1_000_000);
            let told = cpu_percent(&mut marks, now);
            let near = told.zip(percent).is_some_and(|(a, b)| (a - b).abs() < 1e-9);
            assert!(near || told == percent, "{told:?} at {at}");
        }
    }
}
