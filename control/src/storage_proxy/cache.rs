//! What is known of volumes, folders and quota scopes, and what to ask next.
//!
//! In: the time, what is mounted, answers. Out: the next question or how long there is none.
//! Invariants: no socket and no clock in here; what is not mounted any more is forgotten; every
//! answer is asked for anew when it is `interval` old (a tenth less, by chance, so that nodes
//! started together part); a proxy that does not answer is asked less and less, up to `interval`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use super::answers::{FolderUsage, Quota, Space, Volume, VolumeHealth};
use super::folder::FolderId;

/// The most folders and quota scopes asked about.
const MOST: usize = 2048;
/// The first pause after a failure that concerns the proxy; doubled with each.
const FIRST_PAUSE: Duration = Duration::from_secs(5);

/// A folder mounted in a kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// The kernel.
    pub kernel: String,
    /// The folder's name.
    pub name: String,
    /// Where in the container.
    pub target: String,
    /// Where on this node.
    pub source: String,
    /// The folder; none when the manager sent no id.
    pub folder: Option<FolderId>,
}

/// Something to ask for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Query {
    /// The volumes.
    Volumes,
    /// Health and space of a volume.
    Volume(String),
    /// What a quota scope of a volume holds.
    Scope(String, String),
    /// What a folder of a volume holds.
    Folder(String, FolderId),
}

/// What came for a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The volumes.
    Volumes(Vec<Volume>),
    /// Health and space of a volume.
    Volume(VolumeHealth, Space),
    /// Use and limit of a quota scope.
    Scope(Quota),
    /// Use of a folder.
    Folder(FolderUsage),
}

/// Why nothing came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// In words.
    pub words: String,
    /// Whether other questions would end the same way.
    pub of_proxy: bool,
    /// Whether this question took its whole time, and must not be in the way of others.
    pub slow: bool,
}

/// What is known of one question.
#[derive(Clone, Debug, Default)]
pub struct CacheEntry {
    /// The last answer and when it came.
    pub answer: Option<(Answer, Instant)>,
    /// Why the last try brought none.
    pub error: Option<String>,
    /// When to ask again.
    due: Option<Instant>,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Ask this.
    Ask(Query),
    /// Nothing for so long.
    Rest(Duration),
}

/// All of it. Cloned for those who show it.
#[derive(Clone, Debug)]
pub struct Cache {
    interval: Duration,
    known: BTreeMap<Query, CacheEntry>,
    /// Folders beyond the limit.
    pub left_out: usize,
    /// When the proxy last answered anything.
    pub answered: Option<Instant>,
    /// Why it does not answer, and since when.
    pub trouble: Option<(String, Instant)>,
    /// Questions answered, refused, and those nobody answered.
    pub counts: [u64; 3],
    pause: Duration,
    not_before: Option<Instant>,
}

impl Cache {
    /// Nothing is known yet.
    pub fn new(interval: Duration) -> Self {
        Self {
            interval,
            known: BTreeMap::new(),
            left_out: 0,
            answered: None,
            trouble: None,
            counts: [0; 3],
            pause: FIRST_PAUSE.min(interval),
            not_before: None,
        }
    }

    /// What is known of a question.
    pub fn of(&self, question: &Query) -> Option<&CacheEntry> {
        self.known.get(question)
    }

    /// Everything known.
    pub fn all(&self) -> impl Iterator<Item = (&Query, &CacheEntry)> {
        self.known.iter()
    }

    /// The volume a path of this node lies on: the one mounted deepest above it.
    pub fn volume_of(&self, source: &str) -> Option<&Volume> {
        let Some((Answer::Volumes(volumes), _)) = &self.known.get(&Query::Volumes)?.answer else {
            return None;
        };
        let above = volumes.iter().filter(|volume| {
            let path = Path::new(&volume.path);
            path.is_absolute() && Path::new(source).starts_with(path)
        });
        above.max_by_key(|volume| Path::new(&volume.path).components().count())
    }

    /// What to do now that these are mounted.
    pub fn next(&mut self, now: Instant, mounted: &[Mounted]) -> Next {
        let wanted = self.wanted(mounted);
        self.known.retain(|question, _| wanted.contains(question));
        for question in wanted {
            self.known.entry(question).or_default();
        }
        if let Some(rest) = self
            .not_before
            .and_then(|at| at.checked_duration_since(now))
            && !rest.is_zero()
        {
            return Next::Rest(rest);
        }
        // Those never asked first, then the one that waits longest; volumes before all others.
        let first = self
            .known
            .iter()
            .min_by_key(|(question, known)| (known.due, *question));
        match first {
            Some((question, known)) => match known.due {
                Some(due) if due > now => Next::Rest(due.duration_since(now)),
                _ => Next::Ask(question.clone()),
            },
            None => Next::Rest(self.interval),
        }
    }

    fn wanted(&mut self, mounted: &[Mounted]) -> BTreeSet<Query> {
        let mut wanted = BTreeSet::new();
        let mut left_out = BTreeSet::new();
        for mount in mounted {
            let (Some(folder), Some(volume)) = (&mount.folder, self.volume_of(&mount.source))
            else {
                continue;
            };
            let question = Query::Folder(volume.name.clone(), folder.clone());
            if wanted.len() >= MOST && !wanted.contains(&question) {
                left_out.insert(question);
                continue;
            }
            wanted.insert(question);
            wanted.insert(Query::Volume(volume.name.clone()));
            if let Some(scope) = folder.scope() {
                wanted.insert(Query::Scope(volume.name.clone(), scope.to_owned()));
            }
        }
        self.left_out = left_out.len();
        wanted.insert(Query::Volumes);
        wanted
    }

    /// Takes what came. `share` is a number from 0 to 1 by chance.
    pub fn told(
        &mut self,
        now: Instant,
        question: &Query,
        outcome: Result<Answer, Failure>,
        share: f64,
    ) {
        let again = now + self.interval.mul_f64(0.9 + 0.1 * share.clamp(0.0, 1.0));
        let known = self.known.entry(question.clone()).or_default();
        match outcome {
            Ok(answer) => {
                known.answer = Some((answer, now));
                known.error = None;
                known.due = Some(again);
                self.counts[0] += 1;
                self.heard(now);
            }
            Err(failure) => {
                known.error = Some(failure.words.clone());
                if !failure.of_proxy {
                    known.due = Some(again);
                    self.counts[1] += 1;
                    self.heard(now);
                    return;
                }
                if failure.slow {
                    known.due = Some(again);
                }
                self.counts[2] += 1;
                let since = self.trouble.as_ref().map_or(now, |(_, since)| *since);
                self.trouble = Some((failure.words, since));
                self.not_before = Some(now + self.pause);
                self.pause = (self.pause * 2).min(self.interval);
            }
        }
    }

    fn heard(&mut self, now: Instant) {
        self.answered = Some(now);
        self.trouble = None;
        self.not_before = None;
        self.pause = FIRST_PAUSE.min(self.interval);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);
    const SCOPE: &str = "user:f38dea23-50fa-42a0-b5ae-338f5f4693f4";

    fn volume(name: &str, path: &str) -> Volume {
        Volume {
            name: name.to_owned(),
            backend: "vfs".to_owned(),
            path: path.to_owned(),
        }
    }

    fn mounted(number: u32, source: &str) -> Mounted {
        Mounted {
            kernel: "k".to_owned(),
            name: "data".to_owned(),
            target: "/home/work/data".to_owned(),
            source: source.to_owned(),
            folder: FolderId::parse(&format!("{SCOPE}/{number:032x}")),
        }
    }

    fn volumes() -> Answer {
        Answer::Volumes(vec![volume("all", "/mnt"), volume("fast", "/mnt/fast")])
    }

    fn usage() -> Answer {
        Answer::Folder(FolderUsage {
            files: Some(1),
            used: Some(2),
        })
    }

    fn failure(of_proxy: bool, slow: bool) -> Failure {
        Failure {
            words: "no".to_owned(),
            of_proxy,
            slow,
        }
    }

    /// Answers whatever is asked until there is rest.
    fn settle(cache: &mut Cache, now: Instant, mounts: &[Mounted]) -> Vec<Query> {
        let mut asked = Vec::new();
        while let Next::Ask(question) = cache.next(now, mounts) {
            let answer = match &question {
                Query::Volumes => volumes(),
                Query::Volume(_) => Answer::Volume(
                    VolumeHealth {
                        status: "healthy".to_owned(),
                        words: None,
                    },
                    Space {
                        capacity: None,
                        used: None,
                    },
                ),
                Query::Scope(..) => Answer::Scope(Quota {
                    used: None,
                    limit: None,
                }),
                Query::Folder(..) => usage(),
            };
            cache.told(now, &question, Ok(answer), 1.0);
            asked.push(question);
        }
        asked
    }

    #[test]
    fn each_thing_is_asked_once_in_an_interval_and_forgotten_with_its_mount() {
        let start = Instant::now();
        let mut cache = Cache::new(10 * MINUTE);
        // The same folder twice, a subdirectory of it, and one on the deeper volume.
        let mounts = [
            mounted(1, "/mnt/a"),
            mounted(1, "/mnt/a/sub"),
            mounted(2, "/mnt/fast/b"),
            mounted(3, "/mnt-other/c"),
        ];
        let asked = settle(&mut cache, start, &mounts);
        let folder = |volume: &str, number: u32| {
            Query::Folder(volume.to_owned(), mounted(number, "").folder.unwrap())
        };
        let scope = |volume: &str| Query::Scope(volume.to_owned(), SCOPE.to_owned());
        assert_eq!(asked[0], Query::Volumes);
        let expected: BTreeSet<_> = [
            Query::Volumes,
            Query::Volume("all".to_owned()),
            Query::Volume("fast".to_owned()),
            scope("all"),
            scope("fast"),
            folder("all", 1),
            folder("fast", 2),
        ]
        .into();
        assert_eq!(asked.len(), expected.len());
        assert_eq!(asked.into_iter().collect::<BTreeSet<_>>(), expected);
        assert_eq!(cache.volume_of("/mnt-other/c"), None);
        assert_eq!(
            cache.next(start, &mounts),
            Next::Rest(10 * MINUTE),
            "all is known"
        );
        // A new folder does not wait for the others' turn.
        let more = [mounts.as_slice(), &[mounted(4, "/mnt/d")]].concat();
        assert_eq!(
            settle(&mut cache, start + MINUTE, &more),
            [folder("all", 4)]
        );
        assert_eq!(settle(&mut cache, start + 10 * MINUTE, &more).len(), 7);
        // What is not mounted any more is not known any more.
        cache.next(start + 11 * MINUTE, &[]);
        assert_eq!(cache.all().count(), 1);
    }

    #[test]
    fn a_proxy_that_is_away_is_asked_less_and_less_and_at_once_known_to_be_back() {
        let mut now = Instant::now();
        let mut cache = Cache::new(MINUTE);
        let mounts = [mounted(1, "/mnt/a")];
        settle(&mut cache, now, &mounts);
        now += 2 * MINUTE;
        let since = now;
        let mut pauses = Vec::new();
        for _ in 0..6 {
            let Next::Ask(question) = cache.next(now, &mounts) else {
                panic!("it is due");
            };
            assert_eq!(question, Query::Volumes, "the same until it is answered");
            cache.told(now, &question, Err(failure(true, false)), 0.0);
            let Next::Rest(pause) = cache.next(now, &mounts) else {
                panic!("there is a pause");
            };
            pauses.push(pause.as_secs());
            now += pause;
        }
        assert_eq!(pauses, [5, 10, 20, 40, 60, 60]);
        assert_eq!(cache.trouble, Some(("no".to_owned(), since)));
        // The old answers stand, with their age.
        assert_eq!(cache.volume_of("/mnt/a").unwrap().name, "all");
        settle(&mut cache, now, &mounts);
        assert_eq!(cache.trouble, None);
        assert_eq!(cache.counts, [8, 0, 6]);
    }

    #[test]
    fn a_question_that_fails_is_not_in_the_way_of_others() {
        let now = Instant::now();
        let mut cache = Cache::new(MINUTE);
        let mounts = [mounted(1, "/mnt/a"), mounted(2, "/mnt/b")];
        cache.next(now, &mounts);
        cache.told(now, &Query::Volumes, Ok(volumes()), 1.0);
        let mut asked = BTreeSet::new();
        while let Next::Ask(question) = cache.next(now, &mounts) {
            assert!(asked.insert(question.clone()), "{question:?} twice");
            cache.told(now, &question, Err(failure(false, false)), 1.0);
        }
        assert_eq!(asked.len(), 4, "{asked:?}");
        assert_eq!(cache.trouble, None, "it answers, if only with refusals");
        // One that takes all its time waits for its next turn, and the pause lets others go first.
        let mut later = now + 2 * MINUTE;
        let Next::Ask(slow) = cache.next(later, &mounts) else {
            panic!("it is due");
        };
        cache.told(later, &slow, Err(failure(true, true)), 1.0);
        later += FIRST_PAUSE;
        let Next::Ask(other) = cache.next(later, &mounts) else {
            panic!("others are due");
        };
        assert_ne!(other, slow);
    }

    #[test]
    fn the_number_of_questions_has_a_bound() {
        let now = Instant::now();
        let mut cache = Cache::new(MINUTE);
        let mounts: Vec<Mounted> = (0..5000).map(|it| mounted(it, "/mnt/a")).collect();
        cache.next(now, &mounts);
        cache.told(now, &Query::Volumes, Ok(volumes()), 1.0);
        cache.next(now, &mounts);
        assert!(cache.all().count() <= MOST + 3);
        assert!(cache.left_out >= 5000 - MOST);
    }
}
