//! Settings that are one word out of a few.

use std::fmt;

/// A setting that is one of a fixed set of words.
pub(crate) trait Choice: Sized + Copy + 'static {
    const WORDS: &'static [(&'static str, Self)];
    /// Whether upper and lower case are the same.
    const ANY_CASE: bool;
}

macro_rules! choice {
    ($(#[$doc:meta])* $name:ident, any_case: $any:literal, { $($(#[$vdoc:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum $name { $($(#[$vdoc])* $variant,)* }

        impl Choice for $name {
            const WORDS: &'static [(&'static str, Self)] = &[$(($word, Self::$variant),)*];
            const ANY_CASE: bool = $any;
        }

        impl $name {
            /// The word as written in the file.
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)* }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.word())
            }
        }
    };
}

choice! {
    /// `agent.mode`: the container backend.
    Backend, any_case: false, {
        /// The only one this agent runs.
        Docker = "docker",
        /// Refused with words.
        Kubernetes = "kubernetes",
        /// Refused with words.
        Dummy = "dummy",
    }
}
choice! {
    /// `agent.scaling-group-type`.
    ScalingGroupType, any_case: false, {
        /// Compute kernels.
        Compute = "compute",
        /// Storage access (SFTP) kernels.
        Storage = "storage",
    }
}
choice! {
    /// `container.stats-type`.
    StatsType, any_case: false, {
        /// The engine's statistics API in the original.
        Docker = "docker",
        /// The kernel's counters; the original needs root for it.
        Cgroup = "cgroup",
    }
}
choice! {
    /// `container.sandbox-type`.
    SandboxType, any_case: false, {
        /// Docker's own isolation.
        Docker = "docker",
        /// The system call filter of the original, x86_64 only.
        Jail = "jail",
    }
}
choice! {
    /// `container.scratch-type`.
    ScratchType, any_case: false, {
        /// A directory on the host.
        Hostdir = "hostdir",
        /// A file system in a loop file; needs root.
        Hostfile = "hostfile",
        /// A tmpfs.
        Memory = "memory",
        /// Kubernetes only; refused with words.
        K8sNfs = "k8s-nfs",
    }
}
choice! {
    /// `resource.affinity-policy`.
    AffinityPolicy, any_case: true, {
        /// Spread over NUMA nodes.
        Interleaved = "INTERLEAVED",
        /// Fill one NUMA node before the next.
        PreferSingleNode = "PREFER_SINGLE_NODE",
    }
}
choice! {
    /// A log level of the original.
    LogLevel, any_case: true, {
        /// Everything.
        Trace = "TRACE",
        /// Per request.
        Debug = "DEBUG",
        /// Lifecycle steps.
        Info = "INFO",
        /// Degraded but working.
        Warning = "WARNING",
        /// A human must act.
        Error = "ERROR",
        /// Shown as error here.
        Critical = "CRITICAL",
        /// Everything.
        NotSet = "NOTSET",
    }
}

impl LogLevel {
    /// All of them.
    pub fn all() -> impl Iterator<Item = LogLevel> {
        Self::WORDS.iter().map(|(_, level)| *level)
    }

    /// The level as directives of `RUST_LOG` call it.
    #[must_use]
    pub fn directive(self) -> &'static str {
        match self {
            LogLevel::Trace | LogLevel::NotSet => "trace",
            LogLevel::Debug => "debug",
            LogLevel::Info => "info",
            LogLevel::Warning => "warn",
            LogLevel::Error | LogLevel::Critical => "error",
        }
    }
}

choice! {
    /// A log driver of the original.
    LogDriver, any_case: false, {
        /// Standard error.
        Console = "console",
        /// A rotated file; not used here.
        File = "file",
        /// Not used here.
        Logstash = "logstash",
        /// Not used here.
        Graylog = "graylog",
    }
}
choice! {
    /// A log format of the original.
    LogFormat, any_case: true, {
        /// Message only.
        Simple = "simple",
        /// Time, level, module and message.
        Verbose = "verbose",
    }
}
choice! {
    /// `service-discovery.type`.
    DiscoveryType, any_case: false, {
        /// In the bus.
        Redis = "redis",
        /// In etcd.
        Etcd = "etcd",
    }
}
choice! {
    /// `node.forward`: how rows are served.
    Forward, any_case: false, {
        /// In the kernel where that is possible, else by the relay.
        Auto = "auto",
        /// By the relay alone.
        Relay = "relay",
    }
}
choice! {
    /// `node.kernel-attach`: how programs get to interfaces.
    KernelAttach, any_case: false, {
        /// By links where the kernel has them, else by filters.
        Auto = "auto",
        /// By filters of a clsact queueing discipline.
        Filters = "filters",
    }
}
choice! {
    /// `node.relay-engine`: how the relay moves the bytes of connections.
    RelayEngine, any_case: false, {
        /// The one that measures best.
        Auto = "auto",
        /// Messages by reads and writes, bulk by splice.
        Splice = "splice",
        /// Messages by io_uring, bulk by splice.
        Uring = "uring",
    }
}
choice! {
    /// `node.relay-from`: where the relay's connections to containers begin.
    RelayFrom, any_case: false, {
        /// In the container's network namespace, past the bridge and the container's link.
        Container = "container",
        /// On the host, through the bridge.
        Host = "host",
    }
}
choice! {
    /// `node.accelerators.allocation-mode`: what a CUDA device is given out as.
    AllocationMode, any_case: false, {
        /// Whole devices, `cuda.device`.
        Discrete = "discrete",
        /// Shares of devices, `cuda.shares`.
        Fractional = "fractional",
    }
}
choice! {
    /// `node.accelerators.cuda-injection`: how containers get CUDA devices.
    CudaInjection, any_case: false, {
        /// By device requests or by CDI, whatever the engine has.
        Auto = "auto",
        /// By the engine's device requests, which need NVIDIA's container toolkit.
        DeviceRequests = "device-requests",
        /// By the names of a CDI specification of kind nvidia.com/gpu.
        Cdi = "cdi",
        /// By device nodes alone; the image brings the driver's libraries.
        DeviceNodes = "device-nodes",
    }
}
choice! {
    /// `node.publish`: who publishes container ports.
    Publish, any_case: false, {
        /// Rows where container addresses can be reached, else the engine.
        Auto = "auto",
        /// The dataplane, from rows of the shared region.
        Rows = "rows",
        /// The container engine's own port bindings.
        Engine = "engine",
    }
}
