//! What a dom0d that was killed has heard, in a tmpfs: a snapshot, and everything that came after it.
//!
//! Two files take turns, so that one of them is whole at any instant. A file, in little-endian words, then bytes:
//!
//! ```text
//!  0  magic | 1  digest | 2  turn, sum | 3  tries | 4  length of the snapshot | 5  length of the log, sum | snapshot | log
//! ```
//!
//! `turn` is stored last when a file is begun, the length of the log last when something is added to it. Each shares its
//! word with a CRC-32: of all that a file is begun with but the snapshot, which has its own, and of all that was
//! logged since. What does not fit its sum is nothing: what the kernel was told goes on from the log's end, so that a
//! beginning of the log is of no use.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use understudy_bpf::Pages;
use understudy_protocol::RestoreError;

/// Grows with each change of what is written here; a snapshot has a format of its own.
const FORMAT: u8 = 5;

/// What a file begins with, then comes the format as an ASCII digit.
const NAME: [u8; 7] = *b"undstdy";

const MAGIC: u64 = {
    let [a, b, c, d, e, f, g] = NAME;
    u64::from_be_bytes([a, b, c, d, e, f, g, b'0' + FORMAT])
};

const WORD: usize = size_of::<u64>();

/// Bytes of a record's length.
const LENGTH: usize = size_of::<u32>();

/// Places of words, and where bytes begin.
const PLACE_MAGIC: usize = 0;
const PLACE_DIGEST: usize = 1;
const PLACE_TURN: usize = 2;
const PLACE_TRIES: usize = 3;
const PLACE_SNAPSHOT: usize = 4;
const PLACE_LOG: usize = 5;
const HEAD: usize = 6 * WORD;

/// Size of the log in bytes, or as much as the snapshot takes, from which on a new snapshot is due.
const LEAST: usize = 12 << 20;

/// Room beyond, for when there is no time for one.
const RESERVE: usize = 4 << 20;

/// Daemons that may die over one file before it is taken for what kills them.
const TRIES: u64 = 3;

/// See the module.
pub(crate) struct Journal {
    base: PathBuf,
    digest: u64,
    turn: u32,
    /// By the parity of the turn.
    files: [Option<Pages>; 2],
    /// Where the next record goes, in the file whose turn it is, and from where on the next turn is due.
    at: usize,
    due: usize,
    /// Of what was logged.
    sum: u32,
}

/// Why a daemon can't continue where its predecessor stopped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Lost {
    /// There was no predecessor, or it ended in order.
    #[error("nothing was left")]
    Nothing,
    /// A file can't be read.
    #[error("what it left can't be read: {0}")]
    Unreadable(#[from] io::Error),
    /// Another version wrote it.
    #[error("its journal has format {0}, and this dom0d reads format {FORMAT}")]
    OtherFormat(u8),
    /// What was saved can't be restored.
    #[error(transparent)]
    State(#[from] RestoreError),
    /// Conversations and the kernel's maps do not fit this dom0d's configuration, or its programs.
    #[error(
        "the service's PSC, ports, VLAN, bridge, plane or limit of conversations, or dom0d's programs, were others"
    )]
    Differs,
    /// It makes daemons die.
    #[error("{TRIES} dom0ds have died over what it left; please report this with their logs")]
    Deadly,
    /// It contradicts itself.
    #[error("what it left is damaged")]
    Damaged,
}

/// A number in the low half of a word, and the sum that vouches for it in the high half.
fn summed(number: u32, sum: u32) -> u64 {
    u64::from(sum) << 32 | u64::from(number)
}

fn parts(word: u64) -> (u32, u32) {
    (word as u32, (word >> 32) as u32)
}

/// The sum of what came before and these bytes.
fn continued(sum: u32, bytes: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new_with_initial(sum);
    hasher.update(bytes);
    hasher.finalize()
}

/// The turn of a file, 0 while it is being begun; [`Lost::Damaged`] if it is not what was stored.
fn turn_of(pages: &Pages) -> Result<u32, Lost> {
    match pages.word(PLACE_TURN) {
        0 => Ok(0),
        word if word == head(pages, parts(word).0) => Ok(parts(word).0),
        // Another version's words mean something else.
        _ => {
            Err(format_of(pages).filter(|&format| format != FORMAT).map_or(Lost::Damaged, Lost::OtherFormat))
        }
    }
}

/// The format that a file says it has; `None` if it is no journal.
fn format_of(pages: &Pages) -> Option<u8> {
    let [name @ .., digit] = pages.word(PLACE_MAGIC).to_be_bytes();
    (name == NAME).then(|| digit.wrapping_sub(b'0'))
}

/// What vouches for the beginning of a file, with its turn.
fn head(pages: &Pages, turn: u32) -> u64 {
    let words = [PLACE_MAGIC, PLACE_DIGEST, PLACE_SNAPSHOT].map(|place| pages.word(place));
    let of_words = words.iter().fold(0, |sum, word| continued(sum, &word.to_le_bytes()));
    summed(turn, continued(of_words, &turn.to_le_bytes()))
}

fn path(base: &Path, parity: usize) -> PathBuf {
    base.with_extension(["journal.0", "journal.1"][parity])
}

/// Removes a service's journal; none there is fine.
pub(crate) fn remove(base: &Path) -> io::Result<()> {
    for parity in 0..2 {
        match std::fs::remove_file(path(base, parity)) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

impl Journal {
    /// A journal that begins with a snapshot (see [`Journal::turn`]), in files named after `base`.
    pub(crate) fn begin(
        base: &Path,
        digest: u64,
        save: impl Fn(&mut [u8]) -> Option<usize>,
    ) -> io::Result<Self> {
        remove(base)?;
        let files = [None, None];
        let mut journal =
            Self { base: base.to_owned(), digest, turn: 0, files, at: 0, due: usize::MAX, sum: 0 };
        journal.turn(save)?;
        Ok(journal)
    }

    /// What was left in files named after `base`.
    pub(crate) fn left(base: &Path, digest: u64) -> Result<Self, Lost> {
        let mut files = [None, None];
        for (parity, file) in files.iter_mut().enumerate() {
            match Pages::open(&path(base, parity)) {
                Ok(pages) => *file = Some(pages),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error.into()),
            }
        }
        let turns: Vec<u32> = files.iter().flatten().map(turn_of).collect::<Result<_, _>>()?;
        let turn = turns.into_iter().max().ok_or(Lost::Nothing)?;
        let mut journal = Self { base: base.to_owned(), digest, turn, files, at: 0, due: usize::MAX, sum: 0 };
        let pages = journal.current().filter(|_| turn > 0).ok_or(Lost::Damaged)?;
        if pages.word(PLACE_DIGEST) != digest {
            return Err(Lost::Differs);
        }
        let tries = pages.word(PLACE_TRIES);
        if tries >= TRIES {
            return Err(Lost::Deadly);
        }
        if let Some(pages) = journal.current_mut() {
            pages.set_word(PLACE_TRIES, tries + 1);
        }
        Ok(journal)
    }

    fn current(&self) -> Option<&Pages> {
        self.files[(self.turn % 2) as usize].as_ref()
    }

    fn current_mut(&mut self) -> Option<&mut Pages> {
        self.files[(self.turn % 2) as usize].as_mut()
    }

    /// The snapshot.
    pub(crate) fn snapshot(&self) -> Result<&[u8], Lost> {
        let pages = self.current().ok_or(Lost::Damaged)?;
        let length = usize::try_from(pages.word(PLACE_SNAPSHOT)).map_err(|_| Lost::Damaged)?;
        pages.bytes().get(HEAD..).and_then(|bytes| bytes.get(..length)).ok_or(Lost::Damaged)
    }

    /// What came after the snapshot, in order: all of it.
    pub(crate) fn records(&self) -> Result<impl Iterator<Item = &[u8]> + '_, Lost> {
        let pages = self.current().ok_or(Lost::Damaged)?;
        let begin = HEAD + self.snapshot()?.len();
        let (length, sum) = parts(pages.word(PLACE_LOG));
        let log = pages.bytes().get(begin..).and_then(|bytes| bytes.get(..length as usize));
        let mut log = log.filter(|log| crc32fast::hash(log) == sum).ok_or(Lost::Damaged)?;
        Ok(std::iter::from_fn(move || {
            let (length, rest) = log.split_first_chunk::<LENGTH>()?;
            let (record, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
            log = rest;
            Some(record)
        }))
    }

    /// Begins a new turn with a snapshot, in the second of the two files. `save` writes the snapshot to the beginning
    /// of the bytes that it is given and returns its length; `None` if it does not fit.
    pub(crate) fn turn(&mut self, save: impl Fn(&mut [u8]) -> Option<usize>) -> io::Result<()> {
        // A turn takes 12 MiB of log, so the number never wraps.
        let turn = self.turn + 1;
        let parity = (turn % 2) as usize;
        if let Some(pages) = &mut self.files[parity] {
            // From here on this file is no complete journal.
            pages.set_word(PLACE_TURN, 0);
        }
        let mut least = HEAD + LEAST + RESERVE;
        let snapshot = loop {
            let room = &mut self.file(parity, least)?.bytes_mut()[HEAD..];
            match save(room) {
                Some(snapshot) => break snapshot,
                None => least = 2 * (HEAD + room.len()),
            }
        };
        let due = HEAD + snapshot + LEAST.max(snapshot);
        let digest = self.digest;
        let pages = self.file(parity, due + RESERVE)?;
        pages.set_word(PLACE_MAGIC, MAGIC);
        pages.set_word(PLACE_DIGEST, digest);
        pages.set_word(PLACE_TRIES, 0);
        pages.set_word(PLACE_SNAPSHOT, snapshot as u64);
        pages.set_word(PLACE_LOG, 0);
        pages.set_word(PLACE_TURN, head(pages, turn));
        self.turn = turn;
        self.at = HEAD + snapshot;
        self.sum = 0;
        self.due = due;
        Ok(())
    }

    /// A file of at least `least` bytes; keeps the bytes that it has.
    fn file(&mut self, parity: usize, least: usize) -> io::Result<&mut Pages> {
        let pages = match self.files[parity].take() {
            Some(pages) if pages.bytes().len() >= least => pages,
            _ => Pages::create(&path(&self.base, parity), least.next_multiple_of(WORD))?,
        };
        Ok(self.files[parity].insert(pages))
    }

    /// Ends the journal: no successor can continue from it, because later inputs are not recorded.
    pub(crate) fn give_up(mut self) {
        for pages in self.files.iter_mut().flatten() {
            pages.set_word(PLACE_TURN, 0);
        }
    }

    /// A new snapshot should be written.
    pub(crate) fn is_due(&self) -> bool {
        self.at >= self.due
    }

    /// Adds a record. `write` writes it to the beginning of the bytes that it is given and returns its length; `None`
    /// if it does not fit, and then the result is `false`.
    #[must_use]
    pub(crate) fn add(&mut self, write: impl FnOnce(&mut [u8]) -> Option<usize>) -> bool {
        let (at, sum) = (self.at, self.sum);
        let Some(pages) = self.current_mut() else { return false };
        let begin = HEAD + pages.word(PLACE_SNAPSHOT) as usize;
        let Some((head, body)) =
            pages.bytes_mut().get_mut(at..).and_then(<[u8]>::split_first_chunk_mut::<LENGTH>)
        else {
            return false;
        };
        let Some(length) = write(body) else { return false };
        let end = at + LENGTH + length;
        let (Ok(logged), Ok(said)) = (u32::try_from(end - begin), u32::try_from(length)) else {
            return false;
        };
        *head = said.to_le_bytes();
        let Some(record) = pages.bytes().get(at..end) else { return false };
        let sum = continued(sum, record);
        pages.set_word(PLACE_LOG, summed(logged, sum));
        (self.at, self.sum) = (end, sum);
        true
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::os::unix::fs::FileExt;

    use super::*;

    struct Files(PathBuf);

    /// Adds these bytes as a record.
    fn add(journal: &mut Journal, record: &[u8]) -> bool {
        journal.add(saving(record))
    }

    fn saving(snapshot: &[u8]) -> impl Fn(&mut [u8]) -> Option<usize> {
        move |room: &mut [u8]| {
            room.get_mut(..snapshot.len())?.copy_from_slice(snapshot);
            Some(snapshot.len())
        }
    }

    impl Files {
        fn new(name: &str) -> Self {
            Self(std::env::temp_dir().join(format!("dom0d-{name}-{}", std::process::id())))
        }

        /// What a successor finds.
        fn left(&self, digest: u64) -> Result<(Vec<u8>, Vec<Vec<u8>>), Lost> {
            let journal = Journal::left(&self.0, digest)?;
            let records = journal.records()?.map(<[u8]>::to_vec).collect();
            Ok((journal.snapshot()?.to_vec(), records))
        }
    }

    impl Drop for Files {
        fn drop(&mut self) {
            remove(&self.0).unwrap();
        }
    }

    #[test]
    fn a_successor_finds_the_latest_snapshot_and_all_that_followed() {
        let files = Files::new("journal-order");
        assert!(matches!(files.left(7), Err(Lost::Nothing)));
        let mut journal = Journal::begin(&files.0, 7, saving(b"one")).unwrap();
        assert!(add(&mut journal, b"ab"));
        assert!(add(&mut journal, b"c"));
        assert_eq!(files.left(7).unwrap(), (b"one".to_vec(), vec![b"ab".to_vec(), b"c".to_vec()]));
        journal.turn(saving(b"two")).unwrap();
        assert_eq!(files.left(7).unwrap(), (b"two".to_vec(), vec![]));
        assert!(add(&mut journal, b"d"));
        journal.turn(saving(b"three")).unwrap();
        assert!(add(&mut journal, b"e"));
        assert_eq!(files.left(7).unwrap(), (b"three".to_vec(), vec![b"e".to_vec()]));
        assert!(matches!(files.left(8), Err(Lost::Differs)));
    }

    #[test]
    fn a_turn_that_was_not_finished_counts_for_nothing() {
        let files = Files::new("journal-turn");
        let mut journal = Journal::begin(&files.0, 7, saving(b"one")).unwrap();
        assert!(add(&mut journal, b"a"));
        journal.turn(saving(b"two")).unwrap();
        assert!(add(&mut journal, b"b"));
        // The third turn, up to where its own word is stored.
        let pages = journal.files[1].as_mut().unwrap();
        pages.set_word(PLACE_TURN, 0);
        pages.set_word(PLACE_SNAPSHOT, 1 << 40);
        assert_eq!(files.left(7).unwrap(), (b"two".to_vec(), vec![b"b".to_vec()]));
    }

    #[test]
    fn what_kills_daemons_is_left_alone() {
        let files = Files::new("journal-deadly");
        let mut journal = Journal::begin(&files.0, 7, saving(b"one")).unwrap();
        for _ in 0..TRIES {
            files.left(7).unwrap();
        }
        assert!(matches!(files.left(7), Err(Lost::Deadly)));
        journal.turn(saving(b"two")).unwrap();
        files.left(7).unwrap();
    }

    #[test]
    fn a_full_file_says_so_and_keeps_what_it_has() {
        let files = Files::new("journal-full");
        let mut journal = Journal::begin(&files.0, 7, saving(b"one")).unwrap();
        let packet = vec![7; 1 << 20];
        let mut count = 0;
        while !journal.is_due() && add(&mut journal, &packet) {
            count += 1;
        }
        assert!((11..=13).contains(&count), "{count}");
        while add(&mut journal, &packet) {
            count += 1;
        }
        assert!((15..=16).contains(&count), "{count}");
        assert_eq!(files.left(7).unwrap().1.len(), count);
    }

    #[test]
    fn a_snapshot_that_finds_no_room_gets_it() {
        let files = Files::new("journal-large");
        let mut journal = Journal::begin(&files.0, 7, saving(b"one")).unwrap();
        let large = vec![7; 100 << 20];
        journal.turn(saving(&large)).unwrap();
        assert!(add(&mut journal, b"a"));
        assert!(files.left(7).unwrap() == (large, vec![b"a".to_vec()]));
        journal.turn(saving(b"small")).unwrap();
        assert_eq!(files.left(7).unwrap(), (b"small".to_vec(), vec![]));
    }

    #[test]
    fn nobody_follows_what_was_given_up() {
        let files = Files::new("journal-given-up");
        let mut journal = Journal::begin(&files.0, 7, saving(b"one")).unwrap();
        assert!(add(&mut journal, b"a"));
        journal.turn(saving(b"two")).unwrap();
        assert!(add(&mut journal, b"b"));
        journal.give_up();
        assert!(matches!(files.left(7), Err(Lost::Damaged)));
    }

    #[test]
    fn damage_is_an_error() {
        let files = Files::new("journal-damage");
        let mut journal = Journal::begin(&files.0, 7, saving(b"one")).unwrap();
        journal.files[1].as_mut().unwrap().set_word(PLACE_LOG, u64::MAX);
        assert!(matches!(files.left(7), Err(Lost::Damaged)));
        journal.files[1].as_mut().unwrap().set_word(PLACE_SNAPSHOT, u64::MAX);
        assert!(matches!(files.left(7), Err(Lost::Damaged)));
        std::fs::write(path(&files.0, 1), b"short").unwrap();
        assert!(files.left(7).is_err());
        std::fs::write(path(&files.0, 1), vec![0; 4096]).unwrap();
        assert!(files.left(7).is_err());
    }

    /// In memory nothing is torn, but a bit may flip, and somebody may write.
    #[test]
    fn no_byte_may_change_unnoticed() {
        let files = Files::new("journal-flipped");
        let mut journal = Journal::begin(&files.0, 7, saving(b"")).unwrap();
        assert!(add(&mut journal, b"of the turn before"));
        // The snapshot has a sum of its own.
        journal.turn(saving(b"")).unwrap();
        for n in 0..20_u8 {
            assert!(add(&mut journal, &[n; 10]));
        }
        let left = files.left(7).unwrap();
        let begun = std::fs::read(path(&files.0, 0)).unwrap();
        let older = std::fs::read(path(&files.0, 1)).unwrap();
        for (parity, whole, end) in [(0, &begun, HEAD + 20 * 14), (1, &older, HEAD)] {
            for at in 0..end {
                for flip in [0x01, 0x80, 0xff] {
                    let open = |parity| {
                        let path = path(&files.0, parity);
                        std::fs::OpenOptions::new().write(true).open(path).unwrap()
                    };
                    // The count of tries, too.
                    open(0).write_all_at(&begun[..HEAD], 0).unwrap();
                    let file = open(parity);
                    file.write_all_at(&[whole[at] ^ flip], at as u64).unwrap();
                    if let Ok(found) = files.left(7) {
                        assert!(found == left, "file {parity}, byte {at}, flipped by {flip:#x}");
                    }
                    file.write_all_at(&whole[..end], 0).unwrap();
                }
            }
        }
        // A log that is cut short, between two records.
        journal.files[0].as_mut().unwrap().set_word(PLACE_LOG, 14);
        assert!(matches!(files.left(7), Err(Lost::Damaged)));
    }
}
