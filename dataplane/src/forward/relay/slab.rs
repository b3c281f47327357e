//! The table of sessions of one worker.
//!
//! In: sessions. Out: stable positions. Memory grows by chunks and is never moved, so a growing
//! table needs no second copy of itself. Invariant: a freed position is not given out again before
//! [`Slab::recycle`], so an event of the same batch can't reach a stranger; its generation differs
//! afterwards, so a timer entry can't either.

/// Positions per chunk.
const CHUNK: usize = 256;

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

/// A table with stable positions.
#[derive(Debug)]
pub struct Slab<T> {
    chunks: Vec<Box<[Slot<T>]>>,
    free: Vec<u32>,
    resting: Vec<u32>,
    live: usize,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self {
            chunks: Vec::new(),
            free: Vec::new(),
            resting: Vec::new(),
            live: 0,
        }
    }
}

impl<T> Slab<T> {
    fn slot(&self, index: u32) -> Option<&Slot<T>> {
        let index = index as usize;
        self.chunks.get(index / CHUNK)?.get(index % CHUNK)
    }

    fn slot_mut(&mut self, index: u32) -> Option<&mut Slot<T>> {
        let index = index as usize;
        self.chunks.get_mut(index / CHUNK)?.get_mut(index % CHUNK)
    }

    /// The position the next insert will use and its generation.
    ///
    /// # Panics
    /// With 2^32 positions in use, which the limit of descriptors excludes.
    pub fn vacant(&mut self) -> (u32, u32) {
        if self.free.is_empty() {
            let base = self.chunks.len() * CHUNK;
            self.chunks.push(
                (0..CHUNK)
                    .map(|_| Slot {
                        generation: 0,
                        value: None,
                    })
                    .collect(),
            );
            let base = u32::try_from(base).expect("descriptors bound the table far below 2^32");
            self.free.extend(
                (0..u32::try_from(CHUNK).expect("a chunk is small"))
                    .rev()
                    .map(|i| base + i),
            );
        }
        let index = *self.free.last().expect("the list was just filled");
        let generation = self.slot(index).map_or(0, |slot| slot.generation);
        (index, generation)
    }

    /// Puts a value at the position [`Slab::vacant`] named.
    pub fn insert(&mut self, value: T) -> u32 {
        let (index, _) = self.vacant();
        self.free.pop();
        if let Some(slot) = self.slot_mut(index) {
            slot.value = Some(value);
            self.live += 1;
        }
        index
    }

    /// The value at a position.
    pub fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        self.slot_mut(index)?.value.as_mut()
    }

    /// The generation of a position, when it holds a value.
    pub fn generation(&self, index: u32) -> Option<u32> {
        self.slot(index)
            .filter(|slot| slot.value.is_some())
            .map(|slot| slot.generation)
    }

    /// The value at a position when its generation is still this one.
    pub fn get_generation(&mut self, index: u32, generation: u32) -> Option<&mut T> {
        let slot = self.slot_mut(index)?;
        if slot.generation == generation {
            slot.value.as_mut()
        } else {
            None
        }
    }

    /// Takes the value out; the position rests until [`Slab::recycle`].
    pub fn remove(&mut self, index: u32) -> Option<T> {
        let slot = self.slot_mut(index)?;
        let value = slot.value.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.resting.push(index);
        self.live -= 1;
        Some(value)
    }

    /// Makes resting positions available again; called between batches of events.
    pub fn recycle(&mut self) {
        self.free.append(&mut self.resting);
    }

    /// Number of values.
    pub fn live(&self) -> usize {
        self.live
    }

    /// Positions of all values for which `wanted` holds.
    pub fn positions(&self, mut wanted: impl FnMut(&T) -> bool) -> Vec<u32> {
        let mut out = Vec::new();
        for (number, chunk) in self.chunks.iter().enumerate() {
            for (offset, slot) in chunk.iter().enumerate() {
                if slot.value.as_ref().is_some_and(&mut wanted)
                    && let Ok(index) = u32::try_from(number * CHUNK + offset)
                {
                    out.push(index);
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_position_is_not_reused_within_a_batch() {
        let mut slab = Slab::default();
        let a = slab.insert("a");
        assert_eq!(slab.remove(a), Some("a"));
        let b = slab.insert("b");
        assert_ne!(a, b);
        slab.recycle();
        let c = slab.insert("c");
        assert_eq!(a, c);
    }

    #[test]
    fn a_reused_position_has_another_generation() {
        let mut slab = Slab::default();
        let (index, generation) = slab.vacant();
        assert_eq!(slab.insert(1), index);
        assert!(slab.get_generation(index, generation).is_some());
        slab.remove(index);
        slab.recycle();
        assert_eq!(slab.insert(2), index);
        assert!(slab.get_generation(index, generation).is_none());
        assert_eq!(slab.live(), 1);
    }

    #[test]
    fn many_values_keep_their_positions() {
        let mut slab = Slab::default();
        let positions: Vec<u32> = (0..1000).map(|value| slab.insert(value)).collect();
        for (value, index) in positions.iter().enumerate() {
            assert_eq!(slab.get_mut(*index).copied(), Some(value));
        }
        assert_eq!(slab.positions(|value| value % 2 == 0).len(), 500);
    }
}
