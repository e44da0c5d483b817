//! One column of strings of a Parquet file, row after row.

use std::{fs::File, path::Path, sync::Arc};

use parquet::{
    basic::Type,
    column::reader::{ColumnReader, ColumnReaderImpl},
    data_type::{ByteArray, ByteArrayType},
    errors::ParquetError,
    file::reader::{FileReader, SerializedFileReader},
};

use crate::{error::TextError, meter::Counted};

/// Rows decoded at once.
const BATCH_ROWS: usize = 64;

/// The values of a column; a missing one is an empty text.
pub(crate) struct Column {
    name: String,
    file: Arc<SerializedFileReader<File>>,
    n_bytes: u64,
    n_rows: u64,
    index: usize,
    /// Definition level of a value that is there.
    present: i16,
    next_group: usize,
    group: Option<ColumnReaderImpl<ByteArrayType>>,
    /// Decoded rows, the next one last.
    batch: Vec<Option<ByteArray>>,
    row: u64,
    meter: Option<Counted>,
}

impl Column {
    pub(crate) fn open(path: &Path, key: &str, meter: Option<Counted>) -> Result<Self, TextError> {
        let name = path.display().to_string();
        let unreadable = |source| TextError::io("read", path, source);
        let file = File::open(path).map_err(unreadable)?;
        let n_bytes = file.metadata().map_err(unreadable)?.len();
        let file =
            SerializedFileReader::new(file).map_err(|error| bad_parquet(&name, 0, &error))?;
        let schema = file.metadata().file_metadata().schema_descr();
        let columns = schema.columns();
        let index = columns.iter().position(|column| {
            column.path().parts() == [key]
                && column.physical_type() == Type::BYTE_ARRAY
                && column.max_rep_level() == 0
        });
        let Some(index) = index else {
            return Err(TextError::NoColumn {
                file: name,
                column: key.to_owned(),
                columns: columns
                    .iter()
                    .map(|it| format!("`{}` ({})", it.path().string(), it.physical_type()))
                    .collect::<Vec<_>>()
                    .join(", "),
            });
        };
        if let Some(counted) = &meter {
            counted.add(0, n_bytes)?;
        }
        let rows = file.metadata().file_metadata().num_rows();
        Ok(Self {
            present: columns[index].max_def_level(),
            n_rows: u64::try_from(rows).unwrap_or(0),
            name,
            n_bytes,
            index,
            file: Arc::new(file),
            next_group: 0,
            group: None,
            batch: Vec::new(),
            row: 0,
            meter,
        })
    }

    /// The value of the next row.
    pub(crate) fn next_value(&mut self) -> Result<Option<String>, TextError> {
        loop {
            if let Some(value) = self.batch.pop() {
                self.row += 1;
                let Some(value) = value else {
                    return Ok(Some(String::new()));
                };
                return String::from_utf8(value.data().to_vec())
                    .map(Some)
                    .map_err(|error| TextError::NotText {
                        file: format!("{} row {}", self.name, self.row),
                        reason: error.utf8_error().to_string(),
                    });
            }
            if let Some(mut group) = self.group.take() {
                if self.fill(&mut group)? {
                    self.group = Some(group);
                }
            } else if self.next_group < self.file.num_row_groups() {
                self.group = Some(self.open_group(self.next_group)?);
                self.next_group += 1;
            } else {
                return Ok(None);
            }
        }
    }

    fn open_group(&self, index: usize) -> Result<ColumnReaderImpl<ByteArrayType>, TextError> {
        let reader = self
            .file
            .get_row_group(index)
            .and_then(|group| group.get_column_reader(self.index))
            .map_err(|error| bad_parquet(&self.name, self.row, &error))?;
        match reader {
            ColumnReader::ByteArrayColumnReader(reader) => Ok(reader),
            _ => Err(bad_parquet(
                &self.name,
                self.row,
                &ParquetError::General("the schema's type is not the column's".to_owned()),
            )),
        }
    }

    /// Decodes more rows; false at the end of the group.
    fn fill(&mut self, group: &mut ColumnReaderImpl<ByteArrayType>) -> Result<bool, TextError> {
        let (mut levels, mut values) = (Vec::new(), Vec::new());
        let (n_rows, _, _) = group
            .read_records(BATCH_ROWS, Some(&mut levels), None, &mut values)
            .map_err(|error| bad_parquet(&self.name, self.row, &error))?;
        let mut values = values.into_iter();
        self.batch = if self.present == 0 {
            values.map(Some).collect()
        } else {
            let is_present = levels.iter().map(|&level| level == self.present);
            is_present
                .map(|is_there| if is_there { values.next() } else { None })
                .collect()
        };
        self.batch.reverse();
        if let Some(counted) = &self.meter {
            // Pages are as long as they are; rows tell well enough how far it is.
            let at = |row: u64| {
                u128::from(self.n_bytes) * u128::from(row) / u128::from(self.n_rows.max(1))
            };
            let read = at(self.row + n_rows as u64) - at(self.row);
            counted.add(u64::try_from(read).unwrap_or(0), 0)?;
        }
        Ok(n_rows > 0)
    }
}

fn bad_parquet(file: &str, row: u64, error: &ParquetError) -> TextError {
    TextError::BadParquet {
        file: file.to_owned(),
        row,
        reason: error.to_string(),
    }
}
