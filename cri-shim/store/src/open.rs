//! Opening the database file, setting a damaged one aside, and reopening after an I/O error.
//!
//! redb refuses all work after a failed write (a full disk, say), because it no longer knows what
//! the file holds. The store then reopens the file before the next call, which repairs it from the
//! last commit; the caller sees one failed call, not a dead store.

use std::{
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{
        Arc, RwLock, RwLockReadGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use redb::{Database, DatabaseError, ReadableDatabase, StorageError, backends::FileBackend};
use serde::de::DeserializeOwned;

use crate::{Error, Listing, Result, Table, Tx};

/// Version of the record layout, kept in the file. Raised when old builds could misread new records.
const SCHEMA: u32 = 1;
const META: Table<u32> = Table::new("meta");
const SCHEMA_KEY: &str = "schema";

/// Page cache; the whole database of a full node is a few hundred KiB.
const CACHE_BYTES: usize = 4 << 20;

/// The node's durable records. Cheap to clone; all clones are one database.
#[derive(Clone, Debug)]
pub struct Store {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    /// `None` only while a reopening failed; every operation holds the read half to its end.
    database: RwLock<Option<Database>>,
    /// Set when redb met an I/O error and will refuse further work.
    stale: AtomicBool,
}

/// Outcome of [`Store::open`].
#[derive(Debug)]
pub struct Opened {
    /// The open store.
    pub store: Store,
    /// Where the previous file went when it was too damaged to use; the store then started empty.
    pub quarantined: Option<PathBuf>,
}

impl Store {
    /// Opens or creates the database at `path` (mode 0600), verifying every page.
    ///
    /// A damaged file is moved aside and reported in [`Opened::quarantined`]. Fails if the file is
    /// in use, was written by a newer build, or the file system refuses.
    pub fn open(path: impl AsRef<Path>) -> Result<Opened> {
        let path = path.as_ref();
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(|e| file_error("create directory", dir, e))?;
        }
        create_whole(path)?;
        let (database, quarantined) = match open_verified(path)? {
            Verdict::Sound(database) => (database, None),
            Verdict::Damaged => {
                let aside = set_file_aside(path)?;
                create_whole(path)?;
                match open_verified(path)? {
                    Verdict::Sound(database) => (database, Some(aside)),
                    Verdict::Damaged => {
                        let source = StorageError::Corrupted("new file is damaged".into()).into();
                        return Err(Error::Open { path: path.to_owned(), source });
                    }
                }
            }
        };
        let shared = Shared {
            path: path.to_owned(),
            database: RwLock::new(Some(database)),
            stale: AtomicBool::new(false),
        };
        Ok(Opened { store: Self { shared: Arc::new(shared) }, quarantined })
    }

    /// The record under `key`, `None` if there is none, [`Error::Decode`] if it is unreadable.
    pub fn get<R: DeserializeOwned>(&self, table: Table<R>, key: &str) -> Result<Option<R>> {
        self.read(|tx| match open_for_reading(tx, table)? {
            None => Ok(None),
            Some(open) => match open.get(key).map_err(|e| table.failed("read table")(e.into()))? {
                None => Ok(None),
                Some(bytes) => table.decode(key, bytes.value()).map(Some),
            },
        })
    }

    /// Every record of a table in key order.
    pub fn list<R: DeserializeOwned>(&self, table: Table<R>) -> Result<Listing<R>> {
        self.read(|tx| match open_for_reading(tx, table)? {
            None => Ok(Listing::default()),
            Some(open) => {
                let range = redb::ReadableTable::iter(&open)
                    .map_err(|e| table.failed("list table")(e.into()))?;
                table.collect(range)
            }
        })
    }

    /// Runs `work` in one transaction over any tables; durable when this returns `Ok`, without
    /// effect when it returns `Err`. `work` must use its [`Tx`] only: the store itself waits for
    /// the transaction to end.
    pub fn write<T>(&self, work: impl FnOnce(&Tx) -> Result<T>) -> Result<T> {
        self.try_write(work)
    }

    /// [`Store::write`] for callers whose own refusals abort the transaction.
    pub fn try_write<T, E: From<Error>>(
        &self,
        work: impl FnOnce(&Tx) -> std::result::Result<T, E>,
    ) -> std::result::Result<T, E> {
        let guard = self.live()?;
        let begin = |source| Error::Transaction { action: "begin", source };
        let database = guard.as_ref().ok_or_else(|| begin(StorageError::DatabaseClosed.into()))?;
        let inner = database.begin_write().map_err(|e| self.noted(begin(e.into())))?;
        let tx = Tx::new(inner);
        match work(&tx) {
            Ok(value) => {
                tx.commit().map_err(|e| self.noted(e))?;
                Ok(value)
            }
            Err(error) => {
                // An abort that fails leaves nothing behind either, but redb wants reopening then.
                if tx.abort().is_err() {
                    self.shared.stale.store(true, Ordering::Release);
                }
                Err(error)
            }
        }
    }

    fn read<T>(&self, work: impl FnOnce(&redb::ReadTransaction) -> Result<T>) -> Result<T> {
        let guard = self.live()?;
        let begin = |source| Error::Transaction { action: "begin", source };
        let database = guard.as_ref().ok_or_else(|| begin(StorageError::DatabaseClosed.into()))?;
        let tx = database.begin_read().map_err(|e| self.noted(begin(e.into())))?;
        work(&tx).map_err(|e| self.noted(e))
    }

    /// The database, reopened first if its last use ended in an I/O error.
    fn live(&self) -> Result<RwLockReadGuard<'_, Option<Database>>> {
        if self.shared.stale.load(Ordering::Acquire) {
            let mut slot = self.shared.database.write().unwrap_or_else(|e| e.into_inner());
            if self.shared.stale.load(Ordering::Acquire) {
                *slot = None; // releases the file lock
                match open_verified(&self.shared.path)? {
                    Verdict::Sound(database) => *slot = Some(database),
                    Verdict::Damaged => {
                        let source = StorageError::Corrupted("damaged while in use".into()).into();
                        return Err(Error::Open { path: self.shared.path.clone(), source });
                    }
                }
                self.shared.stale.store(false, Ordering::Release);
            }
        }
        Ok(self.shared.database.read().unwrap_or_else(|e| e.into_inner()))
    }

    /// Remembers an I/O error so that the next call reopens the file.
    fn noted(&self, error: Error) -> Error {
        if let Error::Transaction { source, .. } | Error::Table { source, .. } = &error
            && matches!(
                source,
                redb::Error::Io(_)
                    | redb::Error::PreviousIo
                    | redb::Error::Corrupted(_)
                    | redb::Error::DatabaseClosed
            )
        {
            self.shared.stale.store(true, Ordering::Release);
        }
        error
    }
}

fn open_for_reading<R>(
    tx: &redb::ReadTransaction,
    table: Table<R>,
) -> Result<Option<redb::ReadOnlyTable<&'static str, &'static [u8]>>> {
    match tx.open_table(table.definition()) {
        Ok(open) => Ok(Some(open)),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
        Err(e) => Err(table.failed("open table")(e.into())),
    }
}

/// Puts an initialised database where there is none. It is built under another name, because a
/// crash during initialisation leaves a file that looks damaged although it never held anything.
fn create_whole(path: &Path) -> Result<()> {
    match fs::metadata(path) {
        Ok(file) if file.len() > 0 => return Ok(()),
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(file_error("look at", path, e)),
    }
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    if let Verdict::Damaged = open_verified(&new)? {
        fs::remove_file(&new).map_err(|e| file_error("delete", &new, e))?;
        open_verified(&new)?;
    }
    fs::rename(&new, path).map_err(|e| file_error("rename", &new, e))?;
    sync_parent(path)
}

fn sync_parent(path: &Path) -> Result<()> {
    match path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
        Some(dir) => {
            File::open(dir).and_then(|d| d.sync_all()).map_err(|e| file_error("sync", dir, e))
        }
        None => Ok(()),
    }
}

enum Verdict {
    Sound(Database),
    Damaged,
}

fn open_verified(path: &Path) -> Result<Verdict> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map_err(|e| file_error("open", path, e))?;
    let opened = FileBackend::new(file).and_then(|file| {
        Database::builder()
            .set_cache_size(CACHE_BYTES)
            .set_check_integrity_on_open(true)
            .create_with_backend(file)
    });
    let database = match opened {
        Ok(database) => database,
        Err(DatabaseError::DatabaseAlreadyOpen | DatabaseError::LockProtocolMismatch) => {
            return Err(Error::Busy { path: path.to_owned() });
        }
        Err(e) if is_damage(&e) => return Ok(Verdict::Damaged),
        Err(e) => return Err(Error::Open { path: path.to_owned(), source: e.into() }),
    };
    match schema_of(&database) {
        Ok(None) => stamp(&database).map(|()| Verdict::Sound(database)),
        Ok(Some(found)) if found > SCHEMA => {
            Err(Error::NewerSchema { path: path.to_owned(), found, supported: SCHEMA })
        }
        Ok(Some(_)) => Ok(Verdict::Sound(database)),
        // A redb file, but not one of ours.
        Err(Error::Decode { .. }) => Ok(Verdict::Damaged),
        Err(Error::Table { source: redb::Error::TableTypeMismatch { .. }, .. }) => {
            Ok(Verdict::Damaged)
        }
        Err(e) => Err(e),
    }
}

fn is_damage(error: &DatabaseError) -> bool {
    match error {
        DatabaseError::Storage(StorageError::Corrupted(_))
        | DatabaseError::RepairAborted
        | DatabaseError::UpgradeRequired(_) => true,
        DatabaseError::Storage(StorageError::Io(e)) => {
            matches!(e.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof)
        }
        _ => false,
    }
}

fn schema_of(database: &Database) -> Result<Option<u32>> {
    let tx = database
        .begin_read()
        .map_err(|e| Error::Transaction { action: "begin", source: e.into() })?;
    let Some(open) = open_for_reading(&tx, META)? else { return Ok(None) };
    let value = open.get(SCHEMA_KEY).map_err(|e| META.failed("read table")(e.into()))?;
    value.map(|bytes| META.decode(SCHEMA_KEY, bytes.value())).transpose()
}

fn stamp(database: &Database) -> Result<()> {
    let inner = database
        .begin_write()
        .map_err(|e| Error::Transaction { action: "begin", source: e.into() })?;
    let tx = Tx::new(inner);
    tx.put(META, SCHEMA_KEY, &SCHEMA)?;
    tx.commit()
}

/// Renames the file out of the way, never over an earlier quarantined one.
fn set_file_aside(path: &Path) -> Result<PathBuf> {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let base = format!("{}.quarantined-{seconds}", path.display());
    let aside = (0..)
        .map(|n| PathBuf::from(if n == 0 { base.clone() } else { format!("{base}-{n}") }))
        .find(|candidate| !candidate.exists())
        .unwrap_or_else(|| PathBuf::from(&base));
    fs::rename(path, &aside).map_err(|e| file_error("rename", path, e))?;
    sync_parent(path)?;
    Ok(aside)
}

fn file_error(action: &'static str, path: &Path, source: io::Error) -> Error {
    Error::File { action, path: path.to_owned(), source }
}
